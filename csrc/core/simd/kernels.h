// The inner loops of the CPU path, one table of functions per instruction set and value type.
//
// The files that define them are compiled for instruction sets the machine may lack. They include this header and the
// intrinsics alone: an inline function shared with other files could be linked from their object file and then run where
// its instructions do not exist. Hence plain numbers and pointers below, and no type of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace regtopk {

// Lists may be read and written this many elements past their end.
inline constexpr int64_t kListSlack = 16;

// One array per property of the listed entries: those that may turn out to be among the k.
struct ListArrays {
  float* values;      // a
  uint32_t* keys;     // score key
  uint16_t* offsets;  // in the tile
};

struct AccumulateArguments {
  const void* gradient;   // in: [entries] of the value type; ignored by list_again
  float* residual;        // in and out: [entries]
  float decay;            // of the residual; ignored by list_again
  int64_t entries;        // of the block
  uint32_t first_offset;  // of entry 0 in its tile
  uint32_t list_from;     // entries with this key or a larger one are listed
  uint32_t sent_above;    // listed entries with a larger key are taken to be sent: r = a - v. They nearly always are
  bool crowded;           // most vectors have an entry to list: a branch on which do would be foreseen wrongly too often
  ListArrays out;         // room for `entries` and kListSlack more
  bool* non_finite;       // out: set where an entry is not finite, else left alone
  // out, or null: the largest key of each group of kMaximumEntries entries, groups that have none in common and leave out what fills
  // no four vectors at the end. For an entry that is not finite, some key from that of infinity on.
  uint32_t* maxima = nullptr;
};
inline constexpr int64_t kMaximumEntries = 4;

struct PackArguments {
  ListArrays list;
  int64_t listed;
  uint32_t boundary_key;  // entries above it are sent,
  uint32_t ties_until;    // and those equal to it whose offset is below this
  uint32_t sent_above;    // as in AccumulateArguments: what r holds now
  float* residual;        // in and out: the tile
  void* values;           // out: the block's part of the payload
  uint16_t* offsets;      // out, or null where the payload has a bitmap
  uint8_t* bitmap;        // out, zero on entry, or null where the payload has offsets
};

// The part of a payload with a bitmap that lies in one block.
struct BitmapArguments {
  const uint8_t* bitmap;  // in: one bit per gradient entry of the block
  int64_t entries;        // of the block
  const void* values;     // in: those of its payload entries
  float* sums;            // [entries]
  float* taken;           // one per payload entry
};

struct AverageArguments {
  float* sums;              // in: [entries], zero wherever `touched` says so; out: all zero
  const uint8_t* touched;   // one flag per kAverageBlock entries: its sums are not all zero
  void* gradient;           // out: [entries] of the value type
  int64_t entries;
  float divisor;
  bool streaming;  // write around the caches
  bool* non_finite;  // out: set where an average is not finite, else left alone
};
inline constexpr int64_t kAverageBlock = 64;

struct Kernels {
  // r = a, or a - v for entries taken to be sent, or r as it was for entries that are not finite. Reads and writes
  // each array once. Returns how many entries it listed, in ascending order.
  int64_t (*accumulate)(const AccumulateArguments&);
  // The same where r already holds a.
  int64_t (*list_again)(const AccumulateArguments&);
  void (*count_keys)(const uint32_t* keys, int64_t count, uint32_t key, int64_t* above, int64_t* equal);
  // Copies the keys in [low, high] to `out`, which has kListSlack more room, and returns how many there are.
  int64_t (*gather_keys)(const uint32_t* keys, int64_t count, uint32_t low, uint32_t high, uint32_t* out);
  // Writes the block's part of the payload and corrects r where `accumulate` foresaw another outcome. Returns the entries sent.
  int64_t (*pack)(const PackArguments&);
  // sums += values, where the bitmap says so. Returns how many there are.
  int64_t (*add_values)(const BitmapArguments&);
  // taken = sums, where the bitmap says so, one after the other. Returns how many there are.
  int64_t (*take_sums)(const BitmapArguments&);
  void (*write_average)(const AverageArguments&);
};

#if defined(REGTOPK_X86_KERNELS)
extern const Kernels kAvx2Float32, kAvx2BFloat16, kAvx2Float16;
extern const Kernels kAvx512Float32, kAvx512BFloat16, kAvx512Float16;
#endif

}  // namespace regtopk
