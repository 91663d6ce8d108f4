// Logarithms between the bases e and 2, in which processors and GPUs compute powers.
#pragma once

namespace kvquant {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;

}  // namespace kvquant
