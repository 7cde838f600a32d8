#include "streams.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <utility>

namespace late {

class Mark {
 public:
  void pass() {
    {
      const std::lock_guard lock(mutex_);
      passed_ = true;
    }
    changed_.notify_all();
  }
  bool has_passed() {
    const std::lock_guard lock(mutex_);
    return passed_;
  }
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return passed_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool passed_ = false;
};

bool has_passed(const MarkPtr& mark) { return mark->has_passed(); }
void wait_for(const MarkPtr& mark) { mark->wait(); }

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "late device: %s\n", what);
  std::abort();
}

std::atomic<int64_t> paces[kKinds] = {};

class Stream {
 public:
  Stream(Kind kind, StreamId id) : kind_(kind), random_(static_cast<uint64_t>(id)) { std::thread(&Stream::run, this).detach(); }

  void put(std::function<void()> work, bool is_work) {
    {
      const std::lock_guard lock(mutex_);
      queue_.emplace_back(std::move(work), is_work);
    }
    changed_.notify_one();
  }
  MarkPtr mark() {
    auto mark = std::make_shared<Mark>();
    put([mark] { mark->pass(); }, false);
    return mark;
  }
  bool is_done() {
    const std::lock_guard lock(mutex_);
    return queue_.empty() && !is_busy_;
  }

 private:
  void run() {
    at::set_num_threads(1);
    std::unique_lock lock(mutex_);
    for (;;) {
      is_busy_ = false;
      changed_.wait(lock, [this] { return !queue_.empty(); });
      auto [work, is_work] = std::move(queue_.front());
      queue_.pop_front();
      is_busy_ = true;
      lock.unlock();
      const int64_t pace = paces[kind_];
      if (is_work && pace > 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(random_() % static_cast<uint64_t>(pace)));
      }
      try {
        work();
      } catch (const std::exception& error) {
        fail(error.what());
      }
      work = nullptr;
      lock.lock();
    }
  }

  const Kind kind_;
  std::mt19937_64 random_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::pair<std::function<void()>, bool>> queue_;
  bool is_busy_ = false;
};

// All of it lives as long as the process: threads are at work until it ends.
struct Streams {
  std::mutex mutex;
  std::deque<std::unique_ptr<Stream>> all;
  std::vector<StreamId> of_pool;
  size_t next = 0;
  StreamId make(Kind kind) {
    const StreamId id = static_cast<StreamId>(all.size());
    all.push_back(std::make_unique<Stream>(kind, id));
    return id;
  }
};

Streams& streams() {
  static auto* const made = [] {
    auto* const made = new Streams;
    made->make(kMain);
    return made;
  }();
  return *made;
}

Stream& stream_of(StreamId id) {
  Streams& all = streams();
  const std::lock_guard lock(all.mutex);
  return *all.all.at(static_cast<size_t>(id));
}

}  // namespace

StreamId make_stream(Kind kind) {
  Streams& all = streams();
  const std::lock_guard lock(all.mutex);
  return all.make(kind);
}

StreamId next_of_pool() {
  constexpr size_t kPool = 32;  // as torch has of CUDA streams
  Streams& all = streams();
  const std::lock_guard lock(all.mutex);
  if (all.of_pool.size() < kPool) {
    all.of_pool.push_back(all.make(kOfPool));
    return all.of_pool.back();
  }
  return all.of_pool[all.next++ % kPool];
}

void set_pace(Kind kind, int64_t microseconds) { paces[kind] = microseconds; }
void put(StreamId stream, std::function<void()> work) { stream_of(stream).put(std::move(work), true); }
MarkPtr mark(StreamId stream) { return stream_of(stream).mark(); }
void wait_on(StreamId stream, MarkPtr mark) {
  stream_of(stream).put([mark = std::move(mark)] { mark->wait(); }, false);
}
bool is_done(StreamId stream) { return stream_of(stream).is_done(); }
void finish(StreamId stream) { mark(stream)->wait(); }

void finish_all() {
  std::vector<MarkPtr> marks;
  {
    Streams& all = streams();
    const std::lock_guard lock(all.mutex);
    for (const auto& stream : all.all) marks.push_back(stream->mark());
  }
  for (const MarkPtr& mark : marks) mark->wait();
}

struct Block {
  size_t bytes;
  StreamId stream;
  uint8_t* address;
  std::mutex mutex;
  std::set<StreamId> others;
};

namespace {

constexpr size_t kAlignment = 512;  // as of CUDA memory
constexpr int kBits = 0xff;

// Blocks that were let go of, kept for a while to see who still writes to them.
struct Graveyard {
  static constexpr size_t kMostBytes = 256 << 20;
  std::mutex mutex;
  std::deque<Block*> blocks;
  size_t bytes = 0;

  static void check(const Block* block) {
    const auto is_left = [](uint8_t byte) { return byte == kBits; };
    if (!std::all_of(block->address, block->address + block->bytes, is_left)) fail("memory was written to after it was let go of");
  }
  void bury(Block* block) {
    std::memset(block->address, kBits, block->bytes);
    const std::lock_guard lock(mutex);
    blocks.push_back(block);
    bytes += block->bytes;
    while (bytes > kMostBytes) {
      Block* const oldest = blocks.front();
      blocks.pop_front();
      bytes -= oldest->bytes;
      check(oldest);
      std::free(oldest->address);
      delete oldest;
    }
  }
};

Graveyard& graveyard() {
  static auto* const graveyard = new Graveyard;
  return *graveyard;
}

// Waits for several streams, which is no work of any.
StreamId waiting_stream() {
  static const StreamId stream = make_stream(kMain);
  return stream;
}

}  // namespace

Block* allocate(size_t bytes, StreamId stream) {
  const size_t whole = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  auto* const address = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, whole));
  if (address == nullptr) throw std::bad_alloc();
  std::memset(address, kBits, whole);
  return new Block{.bytes = bytes, .stream = stream, .address = address, .mutex = {}, .others = {}};
}

void* address_of(const Block* block) { return block->address; }

void record_use(Block* block, StreamId stream) {
  const std::lock_guard lock(block->mutex);
  if (stream != block->stream) block->others.insert(stream);
}

void let_go(Block* block) {
  std::vector<MarkPtr> marks;
  for (const StreamId other : block->others) marks.push_back(mark(other));
  if (!marks.empty()) marks.push_back(mark(block->stream));
  const auto bury = [block, marks] {
    for (const MarkPtr& mark : marks) mark->wait();
    graveyard().bury(block);
  };
  stream_of(marks.empty() ? block->stream : waiting_stream()).put(bury, false);
}

void check_memory() {
  Graveyard& all = graveyard();
  const std::lock_guard lock(all.mutex);
  for (const Block* block : all.blocks) Graveyard::check(block);
}

}  // namespace late
