#include "agreement.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <sstream>

#include "all_gather.h"

namespace regtopk {
namespace {

constexpr int64_t kMessageBytes = 1024;

std::string serialise(const Fingerprint& fingerprint) {
  std::string text;
  for (const auto& [name, value] : fingerprint) text += name + "=" + value + "\n";
  TORCH_INTERNAL_ASSERT(text.size() < kMessageBytes);
  return text;
}

Fingerprint parse(const std::string& text) {
  Fingerprint fingerprint;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const size_t equals = line.find('=');
    if (equals != std::string::npos) fingerprint.emplace_back(line.substr(0, equals), line.substr(equals + 1));
  }
  return fingerprint;
}

// "0.001 on rank 0, 2 and 0.01 on rank 1"
std::string describe(const std::map<std::string, std::vector<int>>& ranks_by_value) {
  std::string text;
  for (const auto& [value, ranks] : ranks_by_value) {
    if (!text.empty()) text += " and ";
    text += value + " on rank ";
    for (size_t i = 0; i < ranks.size(); ++i) text += (i ? ", " : "") + std::to_string(ranks[i]);
  }
  return text;
}

}  // namespace

void agree(c10d::ProcessGroup& group, const Fingerprint& fingerprint, std::chrono::milliseconds timeout) {
  const int rank = group.getRank(), size = group.getSize();
  const std::string own = serialise(fingerprint);
  const at::Tensor message = at::zeros({kMessageBytes}, at::kByte);
  const at::Tensor messages = at::zeros({size, kMessageBytes}, at::kByte);
  std::copy(own.begin(), own.end(), message.mutable_data_ptr<uint8_t>());

  c10d::AllgatherOptions options;
  options.timeout = timeout;
  try {
    all_gather(group, messages, message, options)->wait();
  } catch (const std::exception& error) {
    C10_THROW_ERROR(
        DistBackendError,
        c10::str("rank ", rank, ": sparse_hook: expected all ", size, " ranks to exchange the same bucket within ",
                 timeout.count() / 1000, " s, got: ", error.what()));
  }

  std::vector<Fingerprint> all;
  for (int other = 0; other < size; ++other) {
    const char* text = reinterpret_cast<const char*>(messages.const_data_ptr<uint8_t>()) + other * kMessageBytes;
    all.push_back(parse(std::string(text, strnlen(text, kMessageBytes))));
  }
  for (size_t field = 0; field < fingerprint.size(); ++field) {
    std::map<std::string, std::vector<int>> ranks_by_value;
    for (int other = 0; other < size; ++other) {
      const bool same_name = field < all[other].size() && all[other][field].first == fingerprint[field].first;
      ranks_by_value[same_name ? all[other][field].second : "another version's fingerprint"].push_back(other);
    }
    TORCH_CHECK_VALUE(
        ranks_by_value.size() == 1, "rank ", rank, ": sparse_hook: expected the same ", fingerprint[field].first,
        " on every rank, got ", describe(ranks_by_value), "; construct the state and the model with the same arguments on every rank");
  }
}

}  // namespace regtopk
