#include "density.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

namespace regtopk {
namespace {

constexpr double kWindow = 100;  // norms in the moving average
// At limits of a quarter and four times the mean at most three times this many steps' bytes are owed, or saved: below 2 % of any run of
// at least kSteady steps.
constexpr double kHorizon = 6, kSteady = 1000;

double power_of(double base, double power) {
  const double root = std::sqrt(std::sqrt(base));
  double result = 1;
  for (int64_t i = 0; i < static_cast<int64_t>(4 * power); ++i) result *= root;
  return result;
}

}  // namespace

void DensityControl::note(double squared_norm, double sent_bytes, double mean_bytes) {
  squared_norm_ += squared_norm;
  sent_bytes_ += sent_bytes;
  mean_bytes_ += mean_bytes;
}

double DensityControl::next(const AdaptiveDensity& rule, bool was_void) {
  if (mean_bytes_ > 0) {
    overspent_ += sent_bytes_ / mean_bytes_ - 1;
    ++steps_;
  }
  const double norm = was_void ? 0 : std::sqrt(squared_norm_);
  squared_norm_ = sent_bytes_ = mean_bytes_ = 0;
  if (!(norm > 0 && std::isfinite(norm))) return rule.mean;
  norms_ = std::min(norms_ + 1, kWindow);
  average_ += (norm - average_) / norms_;
  const double wanted = std::clamp(rule.mean * power_of(norm / average_, rule.power), rule.minimum, rule.maximum);
  const double owed = overspent_ / (kHorizon * std::max(1.0, steps_ / kSteady));
  return std::clamp(owed > 0 ? wanted / (1 + owed) : wanted * (1 - owed), rule.minimum, rule.maximum);
}

std::vector<double> DensityControl::state(bool was_void) const {
  const bool usable = !was_void && std::isfinite(squared_norm_);
  return {average_, norms_, overspent_, steps_, usable ? squared_norm_ : 0, sent_bytes_, mean_bytes_};
}

void DensityControl::restore(const std::vector<double>& state) {
  *this = {};
  if (state.empty()) return;
  TORCH_CHECK_VALUE(state.size() == kNumbers, "expected ", kNumbers, " numbers of an adaptive density, got ", state.size());
  average_ = state[0], norms_ = state[1], overspent_ = state[2], steps_ = state[3];
  squared_norm_ = state[4], sent_bytes_ = state[5], mean_bytes_ = state[6];
}

}  // namespace regtopk
