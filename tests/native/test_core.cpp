// The exchange of one bucket on the core alone, with real threads: sizes around every boundary, hard values, every value
// type, every instruction set. The sanitizers look at each access; the bytes must not depend on the threads, and what is sent
// plus what is kept must be what was given.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/core/aggregate.h"
#include "../../csrc/core/compress.h"
#include "../../csrc/core/cpu_variant.h"
#include "check.h"

namespace {

using namespace regtopk;

// Cuts into ranges of unequal size, one thread each.
ParallelFor threads(int64_t count_of_threads) {
  return [count_of_threads](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
    std::vector<std::thread> running;
    for (int64_t i = 0, begin = 0; i < count_of_threads; ++i) {
      const int64_t end = i + 1 == count_of_threads ? count : std::min(count, begin + (count * (i + 1)) / (count_of_threads * 2) + 1);
      if (end > begin) running.emplace_back([&body, begin, end] { body(begin, end); });
      begin = std::max(begin, end);
    }
    for (std::thread& thread : running) thread.join();
  };
}

enum Values { kNormal, kEqual, kZero, kSubnormal, kRepeated, kHuge, kNonFinite, kKinds };

constexpr int64_t kLargest = 70001;

// Values of one kind, drawn once: drawing them takes longer than what is tested.
const std::vector<double>& pool_of(Values kind) {
  static std::vector<double> pools[kKinds];
  std::vector<double>& pool = pools[kind];
  if (!pool.empty()) return pool;
  std::mt19937_64 random(kind);
  std::normal_distribution<double> normal;
  pool.resize(2 * kLargest);
  for (double& value : pool) {
    switch (kind) {
      case kEqual:
        value = 1.0;
        break;
      case kZero:
        value = random() % 2 ? 0.0 : -0.0;
        break;
      case kSubnormal:
        value = normal(random) * 1e-40;
        break;
      case kRepeated:
        value = random() % 100 ? 0.5 : normal(random);
        break;
      case kHuge:
        value = normal(random) * 3e38;
        break;
      case kNonFinite:
        value = random() % 50 ? normal(random) : (random() % 2 ? HUGE_VAL : std::nan(""));
        break;
      default:
        value = normal(random);
    }
  }
  return pool;
}

template <typename T>
T store(double value) {
  using Accumulate = typename Traits<T>::Accumulate;
  constexpr double largest = std::numeric_limits<Accumulate>::max();
  if (std::isfinite(value)) value = std::clamp(value, -largest, largest);
  return Traits<T>::store(static_cast<Accumulate>(value));
}

struct Result {
  std::vector<uint8_t> payloads;
  std::vector<std::vector<uint8_t>> residuals, averages;
  bool operator==(const Result&) const = default;
};

template <typename Value>
std::vector<uint8_t> bytes_of(const std::vector<Value>& values) {
  const auto* const begin = reinterpret_cast<const uint8_t*>(values.data());
  return {begin, begin + values.size() * sizeof(Value)};
}

// Three steps of three workers, RegTop-k in one of its forms or Top-k; the second step's payloads are put back.
template <typename T>
Result exchange(int64_t numel, int64_t k, Values kind, int form, uint64_t seed, const ParallelFor& parallel_for) {
  using Accumulate = typename Traits<T>::Accumulate;
  constexpr int64_t kWorkers = 3;
  const PayloadLayout layout(numel, k, Traits<T>::kType);
  const Distortion distortion = form == 2 ? Distortion::kCurrent : Distortion::kPrevious;
  std::mt19937_64 random(seed);
  std::vector<std::vector<Accumulate>> residuals(kWorkers, std::vector<Accumulate>(numel, Accumulate{0}));
  std::vector<uint8_t> last;
  std::vector<Accumulate> feedback;
  Result result;
  for (int step = 0; step < 3; ++step) {
    std::vector<uint8_t> payloads(kWorkers * layout.bytes, 0xaa);
    for (int64_t worker = 0; worker < kWorkers; ++worker) {
      const double* const drawn = pool_of(step == 1 ? kNormal : kind).data() + random() % kLargest;
      std::vector<T> gradient(numel);
      for (int64_t i = 0; i < numel; ++i) gradient[i] = store<T>(drawn[i]);
      const std::vector<Accumulate> before = residuals[worker];
      CompressArguments arguments{.layout = layout};
      arguments.gradient = gradient.data();
      arguments.residual = residuals[worker].data();
      arguments.payload = payloads.data() + worker * layout.bytes;
      arguments.step = static_cast<uint64_t>(step);
      std::optional<PayloadView> sent;
      if (!last.empty()) {
        sent.emplace(last.data() + worker * layout.bytes, layout);
        arguments.sent = &*sent;
        if (form != 0) arguments.feedback = feedback.data() + worker * k;
        arguments.distortion = distortion;
      }
      compress(arguments, parallel_for);
      const PayloadView payload(arguments.payload, layout);
      CHECK(!check_payload(arguments.payload, layout, parallel_for));
      CHECK(count_common(payload, payload, parallel_for) == k);
      std::vector<Accumulate> rebuilt = residuals[worker];
      put_back(payload, rebuilt.data(), parallel_for);
      for (int64_t i = 0; i < numel; ++i) {
        const Accumulate given = before[i] + Traits<T>::load(gradient[i]);
        // Without rounding on the wire, r[S] += v is exact: r[S] is 0. What is not finite keeps the residual it had.
        if (sizeof(T) == sizeof(Accumulate)) CHECK(rebuilt[i] == (is_finite(given) ? given : before[i]));
      }
    }
    std::vector<T> average(numel);
    feedback.assign(kWorkers * k, Accumulate{0});
    AggregateArguments arguments{.layout = layout};
    arguments.payloads = payloads.data();
    arguments.workers = kWorkers;
    arguments.gradient = average.data();
    if (form != 0) arguments.feedback = feedback.data(), arguments.feedback_workers = kWorkers;
    arguments.distortion = distortion;
    aggregate(arguments, parallel_for);
    if (step == 1) {
      for (int64_t worker = 0; worker < kWorkers; ++worker) {
        put_back(PayloadView(payloads.data() + worker * layout.bytes, layout), residuals[worker].data(), parallel_for);
      }
      last.clear();
    } else {
      last = payloads;
    }
    result.payloads.insert(result.payloads.end(), payloads.begin(), payloads.end());
    if (kind != kNonFinite) result.averages.push_back(bytes_of(average));  // a NaN's bits are its maker's
  }
  for (const auto& residual : residuals) result.residuals.push_back(bytes_of(residual));
  return result;
}

template <typename T>
int64_t run_type(bool only_threads) {
  int64_t cases = 0;
  for (const int64_t numel : std::initializer_list<int64_t>{1, 2, 15, 17, 64, 65, 1000, 4097, 65536, 65537, kLargest}) {
    for (const double density : {1e-4, 0.001, 0.01, 0.0624, 0.07, 0.5, 1.0}) {
      const int64_t k = std::clamp<int64_t>(static_cast<int64_t>(density * static_cast<double>(numel) + 0.5), 1, numel);
      const bool large = numel > 10000;
      if (large && density != 0.001 && density != 0.07) continue;
      // Every kind of values and every form with some size.
      const auto kind = static_cast<Values>(cases % kKinds);
      const int form = static_cast<int>(cases % 3);
      const bool in_threads = large || cases % 8 == 0;  // starting threads takes most of the time
      const uint64_t seed = static_cast<uint64_t>(++cases);
      if (only_threads && !in_threads) continue;
      const Result serial = exchange<T>(numel, k, kind, form, seed, serial_for);
      if (in_threads) CHECK(serial == exchange<T>(numel, k, kind, form, seed, threads(3)));
    }
  }
  return cases;
}

}  // namespace

// `test_core threads` leaves out the cases that use one thread.
int main(int count, char** arguments) {
  const bool only_threads = count > 1 && std::strcmp(arguments[1], "threads") == 0;
  for (const std::string& variant : available_cpu_variants()) {
    set_cpu_variant(variant);
    const int64_t cases =
        run_type<float>(only_threads) + run_type<double>(only_threads) + run_type<BFloat16>(only_threads) + run_type<Half>(only_threads);
    std::printf("core: %s: %lld buckets exchanged by three workers\n", variant.c_str(), static_cast<long long>(cases));
  }
  return 0;
}
