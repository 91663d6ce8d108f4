// `Vec` of the machine this file is compiled for.
#pragma once

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "cpu/vec_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "cpu/vec_avx2.h"
#else
#include "cpu/vec_scalar.h"
#endif
