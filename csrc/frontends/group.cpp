#include "group.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "../exchange/dense.h"
#include "../exchange/own_support.h"
#include "../exchange/shared_support.h"
#include "../exchange/two_levels.h"
#include "../transport/compare.h"

namespace regtopk {
namespace {

std::string describe_density(const Worker& worker) {
  if (!worker.options.adaptive) return round_trip(worker.density());
  const auto& [mean, power, minimum, maximum] = *worker.options.adaptive;
  return c10::str(
      "adaptive, mean ", round_trip(mean), ", power ", round_trip(power), ", ", round_trip(minimum), " to ", round_trip(maximum));
}

// By the name that the user gave.
std::string describe_wire(const std::optional<at::ScalarType>& dtype) {
  if (!dtype) return "the gradients'";
  return *dtype == at::ScalarType::Bits1x8 ? "sign" : *dtype == at::ScalarType::Bits2x4 ? "2bit" : c10::toString(*dtype);
}

// What ranks that have measured the same say.
std::string describe_measured(const Worker& worker) {
  std::string text;
  for (const double number : worker.density_control.settled()) text += round_trip(number) + " ";
  return worker.options.adaptive ? text + round_trip(worker.density()) : "none";
}

constexpr const char* kTurns = "; average the same lists in the same order on every rank";

// "a of shape [3] and dtype Float, b of ..., ..."
std::string in_words(const Fingerprint& description) {
  constexpr size_t kShown = 4;
  std::string text;
  size_t count = 0;
  for (const auto& [name, value] : description) {
    if (!name.starts_with("tensor ")) continue;
    if (++count <= kShown) text += (count > 1 ? ", " : "") + value;
  }
  return count > kShown ? c10::str(text, ", and ", count - kShown, " more") : text;
}

// The same on every rank, unless one lies elsewhere on its host than levels take it to lie.
std::string describe_numbering(const Transport& transport, const Options& options) {
  const int64_t place = transport.rank() % options.host_ranks;
  if (options.host_ranks == 1 || options.local_rank < 0 || options.local_rank == place) return "one after the other";
  return c10::str("LOCAL_RANK ", options.local_rank, " at rank ", transport.rank());
}

}  // namespace

GroupExchange::GroupExchange(Options options, std::shared_ptr<Clock> clock, Owner owner)
    : worker_(std::make_shared<Worker>(std::move(options), caller_, std::move(clock))),
      owner_(std::move(owner)),
      agreed_density_(worker_->options.schedule ? std::numeric_limits<double>::quiet_NaN() : worker_->density()) {}

GroupExchange::~GroupExchange() { close(); }

Transport& GroupExchange::transport() {
  {
    const std::lock_guard lock(open_mutex_);
    TORCH_CHECK(!closed_, worker_->who, ": expected an open exchange, got one that was closed; construct a new state");
    if (!transport_) {
      transport_ = owner_.open(caller_, [worker = worker_] {
        return c10::str(describe_deed(worker->deed()), " of ", kDeeds, ", in step ", worker->steps.step());
      });
      const int64_t host_ranks = worker_->options.host_ranks;
      worker_->limit = transport_->timeout();
      worker_->rank = transport_->rank() / host_ranks;
      worker_->place = transport_->rank() % host_ranks;
      worker_->workers = std::max<int64_t>(transport_->workers() / host_ranks, 1);  // the ranks compare it with their number
      worker_->who = c10::str("rank ", transport_->rank(), ": ", caller_);
    }
  }
  return *transport_;
}

Worker& GroupExchange::idle_worker() {
  if (transport_) transport_->wait_idle();
  worker_->note_applied(owner_.applied);
  return *worker_;
}

void GroupExchange::use(const std::string& caller) {
  const std::lock_guard lock(open_mutex_);
  TORCH_CHECK_VALUE(
      !used_ || caller == caller_, worker_->who, ": expected a state that ", caller, " alone uses, got one that ", caller_,
      " has used; construct another state");
  if (std::exchange(used_, true)) return;
  caller_ = caller;
  worker_->who = transport_ ? c10::str("rank ", transport_->rank(), ": ", caller) : caller;
}

GroupExchange::FuturePtr GroupExchange::exchange(
    const Bucket& bucket, const at::Tensor& gradient, const at::Tensor& average, const Worker::MakeOwners& owners,
    const std::function<Fingerprint()>& describe, bool absent) {
  if (!worker_->options.dense_rule || !bucket.keeps) return exchange_as_one(bucket, gradient, average, owners, describe, absent);
  const bool begins = worker_->begins_step(bucket);
  std::vector<bool> dense;
  try {
    dense = worker_->ruled_dense(bucket.layout, owners);
  } catch (const std::exception& error) {
    transport_->announce_failure(plain_text(error));
    if (!begins) worker_->steps.clock().make_void(worker_->steps.round());
    throw;
  }
  std::string places;
  for (size_t i = 0; i < dense.size(); ++i) places += dense[i] ? c10::str(places.empty() ? "" : ", ", i) : "";
  const auto describe_part = [&] {
    Fingerprint lines = describe();
    lines.emplace_back("dense parameters of the bucket", places.empty() ? "none" : places);
    return lines;
  };
  Bucket whole = bucket;
  whole.dense = dense.front();
  if (std::equal(dense.begin() + 1, dense.end(), dense.begin()))
    return exchange_as_one(whole, gradient, average, owners, describe_part, absent);
  for (const char letter : places) whole.layout.mark = (whole.layout.mark ^ static_cast<uint8_t>(letter)) * 0x100000001b3ull | 1;
  // The bucket begins the step, and not the one of its parts that has parameters of the step before.
  if (begins) worker_->steps.end();
  return exchange_in_parts(whole, dense, gradient, average, owners, describe_part, absent);
}

void GroupExchange::exchange_nothing(const Bucket& bucket, const Worker::MakeOwners& owners, const std::function<Fingerprint()>& describe) {
  enter(bucket, owners, describe);
}

GroupExchange::FuturePtr GroupExchange::exchange_in_parts(
    const Bucket& bucket, const std::vector<bool>& dense, const at::Tensor& gradient, const at::Tensor& average,
    const Worker::MakeOwners& owners, const std::function<Fingerprint()>& describe, bool absent) {
  struct Part {
    at::Tensor values;
    std::vector<std::pair<int64_t, int64_t>> ranges;  // in the bucket: begin and length
  };
  std::vector<Part> parts;
  std::vector<FuturePtr> pending;
  for (const bool which : {true, false}) {
    Bucket bucket_of_part = bucket;
    bucket_of_part.dense = which;
    bucket_of_part.layout.spans.clear();
    Part& part = parts.emplace_back();
    std::vector<at::Tensor> pieces;
    int64_t begin = 0;
    for (size_t i = 0; i < dense.size(); ++i) {
      const Span& span = bucket.layout.spans[i];
      if (dense[i] == which) {
        bucket_of_part.layout.spans.push_back(span);
        part.ranges.emplace_back(begin, span.numel);
        pieces.push_back(gradient.narrow(0, begin, span.numel));
      }
      begin += span.numel;
    }
    part.values = at::cat(pieces);
    const auto owners_of_part = [&] {
      std::vector<regtopk::Owner> all = owners(), some;
      for (size_t i = 0; i < dense.size(); ++i) {
        if (dense[i] == which) some.push_back(std::move(all[i]));
      }
      return some;
    };
    if (part.values.numel() == 0) continue;
    try {
      pending.push_back(exchange_as_one(bucket_of_part, part.values, part.values, owners_of_part, describe, absent));
    } catch (...) {
      // What the other part has sent returns: nobody gets it.
      if (!pending.empty()) worker_->steps.clock().make_void(worker_->steps.round());
      throw;
    }
  }
  const auto put_together = [parts, average, first = pending.front()](c10::ivalue::Future& done) -> c10::IValue {
    done.value();  // raises what the part has raised
    first->wait();
    const at::NoGradGuard no_grad;
    const at::AutoDispatchBelowADInplaceOrView no_versions;
    for (const Part& part : parts) {
      int64_t from = 0;
      for (const auto& [begin, numel] : part.ranges) {
        average.narrow(0, begin, numel).copy_(part.values.narrow(0, from, numel));
        from += numel;
      }
    }
    return average;
  };
  const auto whole = [this](FuturePtr future) {
    transport_->also_wait_for(future);
    return future;
  };
  if (pending.size() == 1) return whole(pending.front()->then(put_together, c10::TensorType::get()));
  // Not collectAll, whose future knows no streams: on a device what is put together runs on one that waits for both parts, for the second
  // because it follows it, for the first by wait(), which does not hold up the host.
  return whole(pending.front()->thenAsync(
      [put_together, second = pending.back()](c10::ivalue::Future& done) {
        done.value();
        return second->then(put_together, c10::TensorType::get());
      },
      c10::TensorType::get()));
}

GroupExchange::FuturePtr GroupExchange::exchange_as_one(
    const Bucket& bucket, const at::Tensor& gradient, const at::Tensor& average, const Worker::MakeOwners& owners,
    const std::function<Fingerprint()>& describe, bool absent) {
  const std::shared_ptr<Plan> plan = enter(bucket, owners, describe);
  const at::Tensor given = plan && !absent ? correct(*worker_, *plan, gradient, average) : gradient;
  Transport::Bucket moved;
  moved.result = average;
  moved.step = worker_->steps.step();
  moved.keeps = {worker_, plan};
  moved.count_seconds = [worker = worker_](double seconds) { worker->statistics.exchange_seconds += seconds; };
  if (!plan || is_dense()) {
    if (absent) {
      const std::string why = c10::str(worker_->who, ": expected tensors of every rank in a dense step, got none");
      transport_->announce_failure(why);
      C10_THROW_ERROR(ValueError, why);
    }
    if (!average.is_same(given)) average.copy_(given);
    const double bytes = dense::send(*worker_, plan.get(), average);
    moved.fail = [] {};
    return move(
        bucket,
        {{{Transport::Collective::Kind::kAllReduce, average},
          [worker = worker_, average, bytes] { dense::receive(*worker, average, bytes); }}},
        std::move(moved));
  }
  if (worker_->options.host_ranks > 1) {
    two_levels::Way way = two_levels::way(worker_, plan, bucket.layout, given, average);
    moved.fail = std::move(way.fail);
    return move(bucket, std::move(way.stages), std::move(moved));
  }
  const bool shared = is_shared(*worker_, *plan);
  const Sent sent = (shared ? shared_support::choose_or_keep : own_support::send)(*worker_, *plan, given, absent);
  moved.fail = [worker = worker_, plan, sent] { fail(*worker, *plan, sent.payload); };
  return move(bucket, (shared ? shared_support::stages : own_support::stages)(worker_, plan, sent, average), std::move(moved));
}

bool GroupExchange::begin_list(uint64_t list, bool is_whole) {
  const bool all_are_whole = std::all_of(lists_->begin(), lists_->end(), [](const auto& each) { return each.second.is_whole; });
  if (all_are_whole || lists_->size() < 2) return all_are_whole && is_whole;
  const auto known = lists_->find(list);
  agree(transport(), caller_, {{c10::str("tensors", kTurns), known == lists_->end() ? "others" : known->second.words}});
  return false;
}

GroupExchange::FuturePtr GroupExchange::move(const Bucket& bucket, std::vector<Transport::Stage> stages, Transport::Bucket moved) {
  if (bucket.is_whole_list && lists_->size() > 1) {
    const auto check = [lists = lists_, who = worker_->who](const std::vector<int64_t>& numbers) {
      const auto different = std::find_if(numbers.begin(), numbers.end(), [&](int64_t each) { return each != numbers.front(); });
      if (different == numbers.end()) return;
      const auto describe = [&](int64_t each) {
        const auto known = lists->find(static_cast<uint64_t>(each));
        return known == lists->end() ? "others" : known->second.words;
      };
      C10_THROW_ERROR(
          ValueError, c10::str(
                          who, ": expected the same tensors on every rank, got ", describe(numbers.front()), " on rank 0 and ",
                          describe(*different), " on rank ", different - numbers.begin(), kTurns));
    };
    stages.insert(stages.begin(), compare(static_cast<int64_t>(bucket.list), transport_->workers(), check));
  }
  return transport_->exchange(std::move(stages), std::move(moved));
}

std::shared_ptr<Plan> GroupExchange::enter(
    const Bucket& bucket, const Worker::MakeOwners& owners, const std::function<Fingerprint()>& describe) {
  // The caller has waited for all of the step before, unless one bucket's error let it go on while others were pending: what
  // those take and return must not be mixed with what this step does.
  const bool begins = worker_->begins_step(bucket);
  if (begins) transport_->wait_idle();
  std::shared_ptr<Plan> plan;
  try {
    try {
      plan = worker_->enter(bucket, owners, owner_.applied);
    } catch (const std::exception& error) {
      transport_->announce_failure(plain_text(error));
      throw;
    }
    agree_before(bucket, plan.get(), begins, describe);
  } catch (...) {
    // What the step's other buckets have sent returns: as a whole it comes to nobody.
    if (!begins) worker_->steps.clock().make_void(worker_->steps.round());
    throw;
  }
  return plan;
}

void GroupExchange::agree_before(const Bucket& bucket, Plan* plan, bool begins, const std::function<Fingerprint()>& describe) {
  // An adaptive one is equal by construction, unless a rank has done alone what it depends on.
  const std::pair alone(worker_->deed(), worker_->steps.clock().times_made_void());
  if (begins && worker_->options.adaptive && std::exchange(alone_, alone) != alone) forget_agreements();
  if (worker_->is_dense_step() != dense_step_) {
    dense_step_ = worker_->is_dense_step();
    forget_agreements();
  }
  if (plan != nullptr && plan->numel > 0 && worker_->options.host_ranks == 1) advise(*plan);
  const bool is_known = plan != nullptr && worker_->options.host_ranks == 1;  // else the plan is of a part
  const int64_t hash = is_known ? plan->hash : bucket.layout.hash() + (plan != nullptr ? 0 : 1);
  const bool is_new = !agreed_.contains(hash);
  const auto turn = static_cast<int64_t>(static_cast<uint64_t>(previous_) * 0x100000001b3ull ^ static_cast<uint64_t>(hash));
  // Behind a step of which all has been agreed on, no rank has left a bucket of it out.
  const bool is_in_turn = (begins && all_are_new_) || turns_.contains(turn);
  const bool others_are_new = begins || all_are_new_;
  previous_ = 0, all_are_new_ = false;  // and stay that where the ranks do not agree
  if (is_new || !is_in_turn) {
    const Fingerprint description = describe();
    agree_on(bucket, hash, description);
    agreed_.insert(hash);
    if (bucket.list != 0 && !lists_->contains(bucket.list)) {
      lists_ = std::make_shared<Lists>(*lists_);
      lists_->emplace(bucket.list, List{in_words(description), bucket.is_whole_list});
    }
  }
  turns_.insert(turn);
  previous_ = hash, all_are_new_ = others_are_new && is_new;
  // Payloads of unequal size would end the processes: where the density changes all ranks compare it before any is sent.
  if (worker_->options.schedule && worker_->density() != agreed_density_) {
    agree(
        *transport_, caller_,
        {{c10::str("density of step ", worker_->steps.step(), "; its function must return the same on every rank"),
          round_trip(worker_->density())}});
    agreed_density_ = worker_->density();
  }
}

void GroupExchange::agree_on(const Bucket& bucket, int64_t hash, const Fingerprint& description) {
  const Options& options = worker_->options;
  const Layout& layout = bucket.layout;
  Fingerprint fingerprint{
      {"method", options.regularised ? "RegTop-k" : "Top-k"},
      {"density", describe_density(*worker_)},
      {"decay", round_trip(options.decay)},
      {"dense_steps", std::to_string(options.dense_steps)},
      {"wire dtype", describe_wire(options.wire_dtype)},
      {"index code", options.elias_fano ? "elias-fano" : "offsets"},
      {"support", options.leader ? "leader" : "own"},
      {"dense", options.dense_rule   ? "a rule"
                : options.dense_auto ? "auto"
                                     : "never"},
      {"chunk", options.chunk == 0 ? "none" : std::to_string(options.chunk)},
      {"momentum", round_trip(options.momentum)},
      {"nesterov", options.nesterov ? "yes" : "no"},
      {"mask_momentum", options.mask_momentum ? "yes" : "no"},
      {"clip_norm", options.clip_norm == 0 ? "none" : round_trip(options.clip_norm)},
      {"mu", options.regularised ? round_trip(options.mu) : "none"},
      {"distortion", options.regularised ? options.distortion : "none"},
      {"mode; pause, resume and the rule of dense must be the same on every rank", !bucket.keeps  ? "all-reduce of sparse tensors"
                                                                                   : dense_       ? "dense (paused)"
                                                                                   : dense_step_  ? "dense"
                                                                                   : bucket.dense ? "dense by the rule"
                                                                                                  : "sparse"},
      {"levels", options.host_ranks == 1 ? "none" : c10::str(options.host_ranks, " ranks to a host")},
      {"numbering of a host's ranks", describe_numbering(*transport_, options)},
      {"gradient dtype", c10::toString(layout.dtype)}};
  fingerprint.insert(fingerprint.end(), description.begin(), description.end());
  fingerprint.emplace_back("bucket layout (hash)", std::to_string(hash));
  fingerprint.emplace_back(c10::str("calls of ", kDeeds, "; make the call on every rank"), describe_deed(worker_->deed()));
  fingerprint.emplace_back(
      "measurements of the adaptive density; load the same checkpoint, or call reset(), on every rank", describe_measured(*worker_));
  fingerprint.emplace_back(
      "step; load the same checkpoint on every rank, and take as many steps on each", std::to_string(worker_->steps.step()));
  agree(*transport_, caller_, fingerprint);
  TORCH_CHECK_VALUE(
      worker_->ranks() == transport_->workers(), worker_->who, ": expected a multiple of ", options.host_ranks, " ranks with levels of ",
      options.host_ranks, " ranks to a host, got ", transport_->workers(), "; give every host as many, or take levels=None");
}

void GroupExchange::advise(const Plan& plan) {
  const Worker& worker = *worker_;
  if (advised_ || worker.rank != 0 || worker.workers == 1 || worker.options.dense_auto || plan.is_dense() || is_dense()) return;
  const double chosen = bytes_of_chosen(worker, plan, plan.k(), plan.wire()), all = shared_support::bytes_of_all(worker, plan);
  if (chosen <= all) return;
  advised_ = true;
  TORCH_WARN(
      worker.who, ": a bucket of ", plan.numel, " entries sends ", static_cast<int64_t>(chosen), " bytes a step at density ",
      round_trip(worker.density()), " where all its entries would take ", static_cast<int64_t>(all), "; dense='auto' sends those");
}

void GroupExchange::forget_agreements() {
  agreed_.clear();
  turns_.clear();
  lists_ = std::make_shared<Lists>();
}

void GroupExchange::set_dense(bool dense) {
  if (dense == dense_) return;
  dense_ = dense;
  forget_agreements();
  worker_->did(dense ? Deed::kPause : Deed::kResume);
}

void GroupExchange::skipped(Deed deed) {
  idle_worker();
  worker_->steps.clock().make_void(worker_->steps.round());
  worker_->did(deed);
}

void GroupExchange::close(bool tells) {
  std::shared_ptr<Transport> transport;
  decltype(owner_.open) open;  // both let go of without the lock, by one of those that close at once
  decltype(owner_.scale) scale;
  {
    const std::lock_guard lock(open_mutex_);
    tells = tells && !std::exchange(closed_, true);
    closed_ = true;
    transport = transport_;
  }
  if (transport && tells) transport->announce_close();
  if (transport) transport->close();
  const std::lock_guard lock(open_mutex_);
  open.swap(owner_.open);
  scale.swap(owner_.scale);  // what was applied may still be asked for: the residual can be saved
}

}  // namespace regtopk
