// Counters of arrivals (cuda/arrival_tree.cuh), which must be zero when a launch starts, without another launch to
// clear them.
#pragma once
#include <functional>

#include "on_device.h"

namespace fastpool::cuda {

// Calls launch(counters), which puts one kernel on the device's current stream or throws, with `count` counters that
// are zero when the kernel starts.
//
// Every stream has two buffers of counters and uses them in turn: a launch counts in one, and in passing clears in the
// other what the launch before it used. Launches of a stream run one after another, so that whatever one leaves behind,
// the next but one finds zeros. One that throws has not run, and the turn stays where it was.
void with_counters(const OnDevice& device, int64_t count, const std::function<void(const Counters&)>& launch);

}  // namespace fastpool::cuda
