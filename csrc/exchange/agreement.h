// Before payloads move, all ranks compare what decides their sizes and their meaning.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "../transport/transport.h"

namespace regtopk {

// Named values, in the same order on every rank: the fingerprint, readable so that an error can show both values. Behind a "; " in
// a name is what to do where they differ, if it is something else than to give every rank the same arguments.
using Fingerprint = std::vector<std::pair<std::string, std::string>>;

// Gathers the fingerprints of all ranks and waits for them; `caller` is who messages are from. Raises ValueError on every rank, naming the ranks and their
// values, unless all are equal; DistBackendError when a rank does not answer in time.
void agree(Transport& transport, const std::string& caller, const Fingerprint& fingerprint);

// The shortest of the usual forms of a number that reads back as the same double.
std::string round_trip(double value);

}  // namespace regtopk
