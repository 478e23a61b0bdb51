#include "fabric/cpu/rows_choice.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>

namespace moecomm {
namespace {

constexpr int64_t kHidden = 7168;
constexpr int kManyTerms = 8;
constexpr uint64_t kRowBytes = 2 * kHidden;
constexpr const char* kMagic = "moecomm row kernels 1";
constexpr int kProcesses =
    5;  // processes that measure and keep the least times; one of them has a quiet machine

// CPUs whose best variant is known: vendor, family and model as /proc/cpuinfo gives them.
struct KnownCpu {
  const char *cpu, *few, *many;
};
constexpr KnownCpu kKnownCpus[] = {
    // Sapphire Rapids: 4 lines took 3 times as long.
    {"GenuineIntel 6 143", "avx512/1+next", "avx512/1+next"},
};

std::string cpu_name(bool by_number) {
  std::ifstream file("/proc/cpuinfo");
  std::string line, vendor, family, model, name;
  const auto value = [&](const char* key, std::string& to) {
    if (to.empty() && line.rfind(key, 0) == 0 && line.find(": ") != std::string::npos &&
        line.find_first_not_of(" \t", std::strlen(key)) == line.find(':'))
      to = line.substr(line.find(": ") + 2);
  };
  while (std::getline(file, line) && !line.empty()) {
    value("vendor_id", vendor);
    value("cpu family", family);
    value("model", model);
    value("model name", name);
  }
  const std::string numbers = vendor + " " + family + " " + model;
  return by_number ? numbers : name.empty() ? numbers : name + " (" + numbers + ")";
}

// CPU time of this thread: other ranks may start at the same time on the same cores.
double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Rows to sum, in more memory than the second-level cache holds. A place is not reused soon.
class Rows {
 public:
  Rows() : source_(new char[kBytes]), to_(new char[kBytes / 4 + 64]) {
    std::memset(source_.get(), 0x3f, kBytes);
    std::memset(to_.get(), 0, kBytes / 4 + 64);
  }
  // Seconds per row read.
  double time(SumRows sum, int terms) {
    constexpr int kSums = 8;
    TermStore stores[kSums + 1];
    Terms lists[kSums + 1];
    for (int s = 0; s <= kSums; ++s) {
      lists[s].store = &stores[s];
      lists[s].count = terms;
      lists[s].group_end = uint64_t{1} << (terms - 1);
      for (int i = 0; i < terms; ++i) {
        stores[s].row[i] = source_.get() + place_ * kRowBytes;
        stores[s].weight[i] = 0.125f;
        place_ = (place_ + 37) % kRows;  // coprime to kRows
      }
    }
    char* to = to_.get() + (64 - address_of(to_.get()) % 64) % 64;
    const double start = now();
    for (int s = 0; s < kSums; ++s) {
      sum(to + written_ * kRowBytes, lists[s], &lists[s + 1], nullptr, 0, kHidden, DType::bf16, true);
      written_ = (written_ + 1) % (kRows / 4);
    }
    return (now() - start) / (kSums * terms);
  }

 private:
  static constexpr int64_t kRows = 1024;
  static constexpr uint64_t kBytes = kRows * kRowBytes;
  std::unique_ptr<char[]> source_, to_;
  int64_t place_ = 0, written_ = 0;
};

std::string cache_folder() {
  if (const char* folder = std::getenv("MOECOMM_CACHE_DIR")) return folder;
  if (const char* folder = std::getenv("XDG_CACHE_HOME"); folder && *folder == '/')
    return std::string(folder) + "/moecomm";
  const char* home = std::getenv("HOME");
  return home && *home == '/' ? std::string(home) + "/.cache/moecomm" : "";
}

std::string file_of(const std::string& folder, const std::string& cpu) {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  for (const char c : cpu) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  char name[64];
  std::snprintf(name, sizeof name, "/row-kernels-%016llx.txt", static_cast<unsigned long long>(hash));
  return folder + name;
}

// The contents of a small file that belongs to this user; empty if there is none.
std::string read_own_file(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return "";
  struct stat info;
  char text[8192];
  ssize_t n = -1;
  if (fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_uid == geteuid())
    n = read(fd, text, sizeof text);
  close(fd);
  return n > 0 && n < static_cast<ssize_t>(sizeof text) ? std::string(text, n) : "";
}

// Returns false and sets errno if the file cannot be written.
bool write_own_file(const std::string& folder, const std::string& path, const std::string& text) {
  for (size_t at = folder.find('/', 1);; at = folder.find('/', at + 1)) {
    if (mkdir(folder.substr(0, at).c_str(), 0700) != 0 && errno != EEXIST) return false;
    if (at == std::string::npos) break;
  }
  const std::string part = path + "." + std::to_string(getpid());
  const int fd = open(part.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
  if (fd < 0) return false;
  const bool whole = write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  close(fd);
  if (whole && rename(part.c_str(), path.c_str()) == 0) return true;
  const int error = errno;
  unlink(part.c_str());
  errno = error;
  return false;
}

bool is_variant(const std::string& name, const std::string& build) {
  return name.find('/') != std::string::npos && row_kernels_named(name.c_str()) != nullptr &&
         (build.empty() || name.rfind(build + "/", 0) == 0);
}

// Reads a choice. False if it is not for this CPU, or names variants that this process cannot use.
bool parse(const std::string& text, const std::string& build, RowKernelChoice& choice) {
  std::istringstream lines(text);
  std::string magic, cpu, key, name;
  if (!std::getline(lines, magic) || magic != kMagic) return false;
  if (!std::getline(lines, cpu) || cpu != choice.cpu) return false;
  RowKernelChoice read = choice;
  while (lines >> key >> name) {
    if (key == "few") {
      read.few = name;
    } else if (key == "many") {
      read.many = name;
    } else if (key == "processes") {
      read.processes = std::atoi(name.c_str());
    } else if (key == "time") {
      RowKernelTime time{name, 0, 0};
      if (!(lines >> time.few >> time.many)) return false;
      read.times.push_back(time);
    } else {
      return false;
    }
  }
  if (!is_variant(read.few, build) || !is_variant(read.many, build)) return false;
  choice = read;
  return true;
}

std::string text_of(const RowKernelChoice& choice) {
  std::ostringstream text;
  text << kMagic << '\n'
       << choice.cpu << "\nfew " << choice.few << "\nmany " << choice.many << "\nprocesses "
       << choice.processes << '\n';
  for (const RowKernelTime& time : choice.times)
    text << "time " << time.name << ' ' << time.few << ' ' << time.many << '\n';
  return text.str();
}

// The first variant whose time is within noise of the fastest.
std::string fastest(const std::vector<RowKernelTime>& times, double RowKernelTime::* of) {
  double best = times[0].*of;
  for (const RowKernelTime& time : times) best = std::min(best, time.*of);
  for (const RowKernelTime& time : times)
    if (time.*of <= 1.01 * best) return time.name;
  return times[0].name;
}

}  // namespace

std::vector<RowKernelTime> time_row_kernels(const std::vector<const RowKernels*>& variants, double seconds) {
  const double start = now();
  Rows rows;
  std::vector<RowKernelTime> times;
  for (const RowKernels* variant : variants) times.push_back({variant->name, 1e18, 1e18});
  // The least time counts, because other load on the machine can only add to it. Variants that are far behind
  // after some rounds are not measured any more.
  constexpr int kLeastRounds = 3;
  constexpr double kFar = 1.3;
  double few = 1e18, many = 1e18;
  for (int round = 0; round < kLeastRounds || now() - start < seconds; ++round) {
    for (size_t i = 0; i < variants.size(); ++i) {
      if (round < kLeastRounds || times[i].few <= kFar * few)
        times[i].few = std::min(times[i].few, 1e9 * rows.time(variants[i]->few.sum, kFewTerms));
      if (round < kLeastRounds || times[i].many <= kFar * many)
        times[i].many = std::min(times[i].many, 1e9 * rows.time(variants[i]->many.sum, kManyTerms));
    }
    for (const RowKernelTime& time : times) {
      few = std::min(few, time.few);
      many = std::min(many, time.many);
    }
  }
  return times;
}

RowKernelChoice choose_row_kernels(const std::string& folder, const char* build, const char* variant) {
  RowKernelChoice choice;
  choice.cpu = cpu_name(false);
  const bool forced = build && row_kernels_named(build);
  choice.build = forced ? build : row_kernel_builds()[0]->name;
  const std::string only = forced ? choice.build : "";
  if (variant && is_variant(variant, only)) {
    choice.few = choice.many = variant;
    choice.reason = "MOECOMM_ROW_KERNEL";
    return choice;
  }
  for (const KnownCpu& known : kKnownCpus)
    if (cpu_name(true) == known.cpu && is_variant(known.few, only) && is_variant(known.many, only)) {
      choice.few = known.few;
      choice.many = known.many;
      choice.reason = "the table of known CPUs";
      return choice;
    }
  const std::string path = folder.empty() ? "" : file_of(folder, choice.cpu);
  if (!path.empty() && !forced) parse(read_own_file(path), only, choice);
  if (choice.processes >= kProcesses) {
    choice.reason = "measured before: " + path;
    return choice;
  }
  // The baseline build is only for CPUs that can run no other.
  std::vector<const RowKernels*> candidates;
  for (const RowKernels* kernels : row_kernel_variants()) {
    const std::string name = kernels->name;
    if (forced ? name.rfind(only + "/", 0) == 0 : name.rfind("base/", 0) != 0 || choice.build == "base")
      candidates.push_back(kernels);
  }
  const std::vector<RowKernelTime> before = std::move(choice.times);
  choice.times = time_row_kernels(candidates, 0.02);
  for (RowKernelTime& time : choice.times)
    for (const RowKernelTime& earlier : before)
      if (earlier.name == time.name) {
        time.few = std::min(time.few, earlier.few);
        time.many = std::min(time.many, earlier.many);
      }
  choice.few = fastest(choice.times, &RowKernelTime::few);
  choice.many = fastest(choice.times, &RowKernelTime::many);
  ++choice.processes;
  choice.reason = "measured now";
  if (forced)
    choice.reason += "; not kept, since MOECOMM_ISA is set";
  else if (path.empty())
    choice.reason += "; not kept: there is no cache folder (set MOECOMM_CACHE_DIR)";
  else if (!write_own_file(folder, path, text_of(choice)))
    choice.reason += std::string("; not kept: ") + path + ": " + std::strerror(errno);
  else
    choice.reason += " and by " + std::to_string(choice.processes - 1) + " processes before; kept in " + path;
  return choice;
}

const RowKernelChoice& row_kernel_choice() {
  static const RowKernelChoice made =
      choose_row_kernels(cache_folder(), std::getenv("MOECOMM_ISA"), std::getenv("MOECOMM_ROW_KERNEL"));
  return made;
}

}  // namespace moecomm
