// The streams, events and memory of a device that does nothing at once: what a host puts on a stream is done later, on a thread of the
// stream's, in order, and at the pace of that kind of stream. What does not wait for what it needs finds what was there before.
//
// Memory that is let go of belongs to the stream that it was made for, as with torch's allocator of CUDA memory: that stream's next work may
// write over it. Here it does: all bits are set, behind what was on the stream by then, and of other streams behind what was on them if the
// memory was recorded for them. Whoever reads it later reads NaN; whoever writes to it later is found out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace late {

// A place in the work of a stream.
class Mark;
using MarkPtr = std::shared_ptr<Mark>;
bool has_passed(const MarkPtr& mark);
void wait_for(const MarkPtr& mark);

using StreamId = int64_t;
enum Kind : int { kMain, kOfPool, kOfCollectives, kKinds };
inline constexpr StreamId kMainStream = 0;

StreamId make_stream(Kind kind);
StreamId next_of_pool();
// Every piece of work on a stream of that kind takes up to so much longer than it has to.
void set_pace(Kind kind, int64_t microseconds);

// What fails in `work` ends the process.
void put(StreamId stream, std::function<void()> work);
MarkPtr mark(StreamId stream);  // behind what is on the stream by now
void wait_on(StreamId stream, MarkPtr mark);  // what comes on the stream is done behind the mark
bool is_done(StreamId stream);
void finish(StreamId stream);  // waits
void finish_all();

struct Block;
Block* allocate(size_t bytes, StreamId stream);
void* address_of(const Block* block);
void record_use(Block* block, StreamId stream);
void let_go(Block* block);
// Ends the process if memory was written to after it was let go of.
void check_memory();

}  // namespace late
