#include "agreement.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <sstream>

namespace regtopk {
namespace {

// Names of tensors are anything: what ends a line, or a message of an error, is written out.
std::string in_one_line(const std::string& value) {
  std::string text;
  for (const char letter : value) {
    if (letter == '\n') text += "\\n";
    else if (letter == '\0') text += "\\0";
    else if (letter == '\\') text += "\\\\";
    else text += letter;
  }
  return text;
}

std::string serialise(const Fingerprint& fingerprint) {
  std::string text;
  for (const auto& [name, value] : fingerprint) {
    TORCH_INTERNAL_ASSERT(name.find('=') == std::string::npos, name);  // no rank would find it again
    text += name + "=" + in_one_line(value) + "\n";
  }
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

void agree(Transport& transport, const std::string& caller, const Fingerprint& fingerprint) {
  std::vector<Fingerprint> all;
  for (const std::string& text : transport.gather_texts(serialise(fingerprint), caller, "the agreement on a bucket and its options")) {
    all.push_back(parse(text));
  }
  for (size_t field = 0; field < fingerprint.size(); ++field) {
    std::map<std::string, std::vector<int>> ranks_by_value;
    for (size_t other = 0; other < all.size(); ++other) {
      const bool same_name = field < all[other].size() && all[other][field].first == fingerprint[field].first;
      ranks_by_value[same_name ? all[other][field].second : "another version's fingerprint"].push_back(static_cast<int>(other));
    }
    const std::string& name = fingerprint[field].first;
    const size_t end = std::min(name.find("; "), name.size());
    TORCH_CHECK_VALUE(
        ranks_by_value.size() == 1, "rank ", transport.rank(), ": ", caller, ": expected the same ", name.substr(0, end),
        " on every rank, got ", describe(ranks_by_value),
        end < name.size() ? name.substr(end) : "; construct the state and the model with the same arguments on every rank");
  }
}

std::string round_trip(double value) {
  for (const int digits : {6, 15, 17}) {
    char text[40];
    std::snprintf(text, sizeof text, "%.*g", digits, value);
    if (std::strtod(text, nullptr) == value) return text;
  }
  return "nan";
}

}  // namespace regtopk
