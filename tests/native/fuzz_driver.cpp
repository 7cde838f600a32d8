// Feeds the fuzz target without libFuzzer: `fuzz_payload SECONDS [SEED]` for random inputs, `fuzz_payload FILE` for one again.
// The input in hand is in crash-input while the target runs, so that a finding leaves it behind.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include <signal.h>

extern long long accepted_inputs;
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

std::vector<uint8_t> input;

void write_input() {
  std::ofstream("crash-input", std::ios::binary)
      .write(reinterpret_cast<const char*>(input.data()), static_cast<std::streamsize>(input.size()));
  std::fprintf(stderr, "fuzz_payload: the input is in crash-input; fuzz_payload crash-input runs it again\n");
}

void on_abort(int) {
  write_input();
  std::_Exit(1);
}

// A few edits; more often one than many, since a payload with one wrong byte tells most.
void draw(std::mt19937_64& random) {
  const size_t edits = random() % 4 == 0 ? random() % 12 : random() % 3;
  input.resize(8 + 5 * edits);
  for (uint8_t& byte : input) byte = static_cast<uint8_t>(random());
  for (size_t edit = 0; edit < edits; ++edit) {
    if (random() % 2) input[8 + 5 * edit + 4] = static_cast<uint8_t>(1u << (random() % 8));
  }
}

}  // namespace

// The sanitizers end the process by themselves; this is how they leave the input behind.
extern "C" void __asan_on_error() { write_input(); }

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "fuzz_payload: expected SECONDS [SEED] or FILE\n");
    return 2;
  }
  signal(SIGABRT, on_abort);
  if (std::ifstream file(arguments[1], std::ios::binary); file) {
    input.assign(std::istreambuf_iterator<char>(file), {});
    LLVMFuzzerTestOneInput(input.data(), input.size());
    return 0;
  }
  const double seconds = std::strtod(arguments[1], nullptr);
  const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : std::random_device{}();
  std::mt19937_64 random(seed);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  long long runs = 0;
  while (std::chrono::steady_clock::now() < end) {
    draw(random);
    LLVMFuzzerTestOneInput(input.data(), input.size());
    ++runs;
  }
  std::printf(
      "fuzz_payload: seed %llu, %lld inputs, %lld accepted, %lld rejected, no finding\n", static_cast<unsigned long long>(seed), runs,
      accepted_inputs, runs - accepted_inputs);
  return accepted_inputs > 0 && accepted_inputs < runs ? 0 : 1;
}
