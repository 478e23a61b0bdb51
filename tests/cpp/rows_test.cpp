// Sums of rows: every variant of every build of the kernels that this machine can run is compared bit for bit
// with scalar code, for many row lengths, numbers of terms, groupings, weights, biases and destinations.
// Nothing outside the row is written.
#include <stdlib.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>

#include "check.hpp"
#include "fabric/cpu/rows_choice.hpp"

using namespace moecomm;

namespace {

#if defined(__aarch64__)
using Half = __fp16;  // older compilers have no _Float16 here
#else
using Half = _Float16;
#endif

// The variants that this machine can run.
std::vector<const char*> variants() {
  std::vector<const char*> found;
  for (const RowKernels* kernels : row_kernel_variants()) found.push_back(kernels->name);
  return found;
}

template <class T>
T read(const char* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

float element(const char* row, int64_t i, DType type) {
  switch (type) {
    case DType::bf16: {
      const uint32_t bits = uint32_t{read<uint16_t>(row + 2 * i)} << 16;
      return read<float>(reinterpret_cast<const char*>(&bits));
    }
    case DType::f16: return static_cast<float>(read<Half>(row + 2 * i));
    default: return read<float>(row + 4 * i);
  }
}

// Rounded to nearest even, as stored in memory; every NaN is the same one.
uint32_t rounded(float v, DType type) {
  if (std::isnan(v)) return ~0u;
  if (type == DType::f32) return read<uint32_t>(reinterpret_cast<const char*>(&v));
  if (type == DType::f16) {
    const Half h = static_cast<Half>(v);
    return read<uint16_t>(reinterpret_cast<const char*>(&h));
  }
  const uint32_t bits = read<uint32_t>(reinterpret_cast<const char*>(&v)), kept = bits >> 16,
                 lost = bits & 0xffff;
  return kept + (lost > 0x8000 || (lost == 0x8000 && (kept & 1)));
}

uint32_t stored(const char* row, int64_t i, DType type) {
  if (std::isnan(element(row, i, type))) return ~0u;
  return type == DType::f32 ? read<uint32_t>(row + 4 * i) : read<uint16_t>(row + 2 * i);
}

float sum(const Terms& terms, const float* bias, int64_t i, DType type) {
  float total = 0, part = 0;
  bool first_group = true, first_term = true;
  for (int t = 0; t < terms.count; ++t) {
    const float product =
        element(static_cast<const char*>(terms.store->row[t]), i, type) * terms.store->weight[t];
    part = first_term ? product : part + product;
    first_term = false;
    if (!(terms.group_end >> t & 1)) continue;
    total = first_group ? part : total + part;
    first_group = false;
    first_term = true;
  }
  return bias ? total + bias[i] : total;
}

}  // namespace

TEST_CASES(sums_equal_scalar_code, variants()) {
  const RowKernels* kernels = row_kernels_named(value);
  REQUIRE(kernels != nullptr);
  std::mt19937_64 random(std::random_device{}());
  const auto pick = [&](int n) { return static_cast<int>(random() % n); };
  constexpr DType kTypes[] = {DType::bf16, DType::f16, DType::f32};
  alignas(64) static char out[8192];
  for (int round = 0; round < 700; ++round) {
    const DType type = kTypes[pick(3)];
    const int bytes = type == DType::f32 ? 4 : 2, count = pick(9), offset = 16 * pick(5);
    const int64_t hidden = (16 / bytes) * (1 + pick(90)), begin = hidden > kTile && pick(2) ? kTile : 0;
    // Random bits (NaN, infinities, subnormals), or small numbers whose sums are ties of the rounding.
    std::vector<char> rows(count * hidden * bytes);
    const bool any = pick(2);
    for (size_t i = 0; i < rows.size(); i += bytes) {
      const float small = (pick(512) - 256) / 64.0f;
      const uint32_t bits = any ? static_cast<uint32_t>(random()) : rounded(small, type);
      std::memcpy(rows.data() + i, &bits, bytes);
    }
    std::vector<float> biases(hidden);
    for (float& b : biases) b = (pick(2000) - 1000) / 512.0f;
    TermStore store;
    Terms terms{&store};
    for (int t = 0; t < count; ++t) {
      store.row[t] = rows.data() + t * hidden * bytes;
      store.weight[t] = pick(2) ? 1.0f : (pick(64) - 32) / 8.0f;
      ++terms.count;
      if (pick(2)) terms.close_group();
    }
    terms.close_group();
    const float* bias = pick(2) ? biases.data() : nullptr;
    std::memset(out, 0x5a, sizeof out);
    char* row = out + 64 + offset;
    kernels->reduce(row, terms, pick(2) ? &terms : nullptr, bias, begin, hidden, type, pick(2));
    kernels->fence();
    for (int64_t i = begin; i < hidden; ++i)
      CHECK_EQ(stored(row, i, type), rounded(sum(terms, bias, i, type), type));
    for (const char* p = out; p < out + sizeof out; ++p)
      if (p < row + begin * bytes || p >= row + hidden * bytes) CHECK(*p == 0x5a);
  }
}

// -- the choice -------------------------------------------------------------------------------------------

namespace {

std::string folder() {
  char name[] = "/tmp/moecomm-rows-XXXXXX";
  REQUIRE(mkdtemp(name) != nullptr);
  return std::string(name) + "/cache";
}

std::string only_file(const std::string& in) {
  std::string found;
  for (const auto& entry : std::filesystem::directory_iterator(in)) {
    CHECK(found.empty());
    found = entry.path();
  }
  return found;
}

std::string read_all(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

TEST(a_measured_choice_is_kept_and_found_again) {
  const std::string cache = folder();
  const RowKernelChoice first = choose_row_kernels(cache, nullptr, nullptr);
  if (first.reason == "the table of known CPUs") SKIP("this CPU is in the table");
  CHECK_EQ(first.reason, "measured now and by 0 processes before; kept in " + only_file(cache));
  CHECK_EQ(choose_row_kernels(cache, nullptr, nullptr).processes, 2);
  for (int i = 3; i <= 5; ++i) choose_row_kernels(cache, nullptr, nullptr);
  CHECK(!first.times.empty());
  for (const RowKernelTime& time : first.times) CHECK(time.few > 0 && time.many > 0 && time.many < 1e6);
  const RowKernelChoice second = choose_row_kernels(cache, nullptr, nullptr);
  CHECK_EQ(second.reason, "measured before: " + only_file(cache));
  CHECK_EQ(choose_row_kernels(cache, nullptr, nullptr).many, second.many);
  for (size_t i = 0; i < first.times.size(); ++i) CHECK(second.times[i].many <= 1.001 * first.times[i].many);
  CHECK_EQ(second.times.size(), first.times.size());
  std::filesystem::remove_all(std::filesystem::path(cache).parent_path());
}

TEST(a_file_that_is_not_ours_is_not_believed) {
  const std::string cache = folder();
  RowKernelChoice first = choose_row_kernels(cache, nullptr, nullptr);
  if (first.reason == "the table of known CPUs") SKIP("this CPU is in the table");
  while (first.processes < 5) first = choose_row_kernels(cache, nullptr, nullptr);
  const std::string path = only_file(cache), good = read_all(path);
  const auto believed = [&](const std::string& text) {
    std::ofstream(path) << text;
    return choose_row_kernels(cache, nullptr, nullptr).reason.rfind("measured before", 0) == 0;
  };
  CHECK(believed(good));
  for (size_t n : {size_t{0}, size_t{5}, good.find("few") + 3, good.find("many")})
    CHECK(!believed(good.substr(0, n)));
  CHECK(!believed("other " + good));
  CHECK(!believed(good + "few nothing/4\n"));
  CHECK(!believed(good + "time avx2/1 x\n"));
  CHECK(!believed(good + std::string(10000, ' ')));
  CHECK(believed(good));
  std::filesystem::rename(path, path + ".elsewhere");
  std::filesystem::create_symlink(path + ".elsewhere", path);
  CHECK_EQ(choose_row_kernels(cache, nullptr, nullptr).reason,
           "measured now and by 0 processes before; kept in " + path);
  CHECK(!std::filesystem::is_symlink(path));
  CHECK_EQ(read_all(path + ".elsewhere"), good);
  std::filesystem::remove_all(std::filesystem::path(cache).parent_path());
}

TEST(every_build_of_this_machine_has_its_variants) {
  CHECK_EQ(variants().size(), row_kernel_builds().size() * kSumVariants);
  CHECK_EQ(std::string(row_kernel_builds().back()->name), std::string("base"));
#if defined(__aarch64__)
  CHECK(row_kernels_named("neon/4+next") != nullptr);
#elif defined(__x86_64__)
  CHECK_EQ(row_kernels_named("avx2/1") != nullptr, bool(__builtin_cpu_supports("avx2")));
#endif
}

TEST(the_user_decides) {
  CHECK_EQ(choose_row_kernels("", nullptr, "base/4").many, std::string("base/4"));
  const RowKernelChoice forced = choose_row_kernels("", "base", nullptr);
  CHECK_EQ(forced.build, std::string("base"));
  CHECK_EQ(forced.few.substr(0, 5) + forced.many.substr(0, 5), std::string("base/base/"));
  CHECK_EQ(choose_row_kernels("", "base", "avx2/1").many.substr(0, 5), std::string("base/"));
  const RowKernelChoice nowhere = choose_row_kernels("/proc/no/such", nullptr, nullptr);
  CHECK(nowhere.reason == "the table of known CPUs" ||
        nowhere.reason.find("not kept: /proc/no/such") != std::string::npos);
  CHECK(row_kernels_named("avx2/3") == nullptr && row_kernels_named("") == nullptr);
}
