// A program from the assembler's text.
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "machine.hpp"

namespace simt {

void add_arithmetic(std::map<std::string, Operation>& all);
void add_memory(std::map<std::string, Operation>& all);
void add_async(std::map<std::string, Operation>& all);
void add_control(std::map<std::string, Operation>& all);

namespace {

struct Known {
  std::map<std::string, Operation> all;
  std::vector<std::string> names;
  std::map<std::string, uint16_t> numbers;
  Known() {
    add_arithmetic(all), add_memory(all), add_async(all), add_control(all);
    for (const auto& [name, operation] : all) {
      numbers[name] = static_cast<uint16_t>(names.size());
      names.push_back(name);
    }
  }
};
const Known& known() {
  static const Known one;
  return one;
}

}  // namespace

const std::vector<std::string>& operation_names() { return known().names; }

const Function& Program::entry(const std::string& part) const {
  for (const Function& f : functions)
    if (f.entry && f.name.find(part) != std::string::npos) return f;
  throw std::runtime_error("the PTX world: no kernel " + part + " in " + path);
}

std::string Program::where(const Ins& i) const {
  const auto f = files.find(i.file);
  return "PTX line " + std::to_string(i.line) + " (" + operation_names()[i.op] + ", " +
         (f == files.end() ? "?" : f->second) + ":" + std::to_string(i.source) + ")";
}

// Dropped: lanes go on. A wait for a phase has ended at once; a bulk load still tells its barrier.
void mutate(Ins& i, bool drop, int order, int scope, int64_t integer) {
  if (drop) {
    i.run = i.kind == Kind::poll ? +[](Warp& w, const Ins& wait, Mask m) { w.predicates[wait.r[0]] |= m; }
                                 : nullptr;
    i.kind = i.run ? Kind::poll : Kind::plain;
    if (!i.run) i.run = +[](Warp&, const Ins&, Mask) {};
  }
  if (order >= 0) i.order = static_cast<Order>(order);
  if (scope >= 0) i.scope = static_cast<Scope>(scope);
  i.integer += integer;
}

Program load_program(const std::string& path) {
  Program p;
  p.path = path;
  std::ifstream in(path);
  if (!in) throw std::runtime_error("the PTX world: cannot read " + path);
  std::string word, line;
  int version = 0;
  size_t rows = 0;
  in >> word >> version >> rows >> p.slots >> p.predicates >> p.local_bytes >> p.shared_bytes;
  if (word != "machine" || version != 2)
    throw std::runtime_error("the PTX world: " + path + " is of another version");
  while (p.code.size() < rows && in >> word) {
    if (word == "file") {
      int number;
      in >> number;
      std::getline(in >> std::ws, p.files[number]);
    } else if (word == "constant") {
      int slot;
      uint64_t value;
      in >> slot >> value;
      p.constants.emplace_back(slot, value);
    } else if (word == "function") {
      Function f;
      size_t parts;
      in >> f.name >> f.entry >> f.begin >> f.end >> f.parameter_bytes >> parts;
      f.parameters.resize(parts);
      for (auto& [at, bytes] : f.parameters) in >> at >> bytes;
      p.functions.push_back(f);
    } else {
      const auto found = known().all.find(word);
      if (found == known().all.end())
        throw std::runtime_error("the PTX world: an operation that the machine does not have: " + word);
      Ins& i = p.code.emplace_back();
      int order, scope;
      char colon;
      in >> order >> scope >> i.guard;
      for (int32_t& r : i.r) in >> r;
      int reads, writes;
      in >> i.integer >> i.line >> i.file >> colon >> i.source >> reads >> writes;
      i.reads = static_cast<uint8_t>(reads), i.writes = static_cast<uint8_t>(writes);
      i.run = found->second.run;
      i.kind = found->second.kind;
      i.order = static_cast<Order>(order);
      i.scope = static_cast<Scope>(scope);
      i.op = known().numbers.at(word);
    }
  }
  if (p.code.size() != rows || !in) throw std::runtime_error("the PTX world: " + path + " ends early");
  return p;
}

}  // namespace simt
