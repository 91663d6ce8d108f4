"""The instruction sets of the CPU backend that run here, and the tolerance of attention against the reference."""

from __future__ import annotations

import torch

from hf_kvquant import reference
from hf_kvquant.backends import cpu

LEVELS = cpu.info()["available"]
# The largest error of an output, relative to the largest value, and of a log-sum-exp. FP32 sums in another order; FP16
# and BF16 outputs are rounded to the query's dtype (2^-11, 2^-9).
TOLERANCE = {torch.float32: (2e-5, 2e-4), torch.float16: (2e-3, 2e-3), torch.bfloat16: (8e-3, 4e-3)}


def check(query, keys, values, mask=None, s_aux=None, *, softcap=0.0, levels=LEVELS):
    scaling = query.shape[-1] ** -0.5
    arguments = (query, keys, values, mask, s_aux)
    expected, expected_lse = reference.decode_attention(*arguments, scaling=scaling, softcap=softcap)
    tolerance, lse_tolerance = TOLERANCE[query.dtype]
    for level in levels:
        output, lse = cpu.decode_attention(*arguments, scaling=scaling, softcap=softcap, isa=level)
        assert output.dtype == expected.dtype and output.shape == expected.shape
        assert lse.dtype == torch.float32 and lse.shape == expected_lse.shape
        largest = max(expected.float().abs().max().item(), 1e-6)
        error = (output.float() - expected.float()).abs().max().item()
        assert error <= tolerance * largest, (level, error, largest)
        torch.testing.assert_close(lse, expected_lse, rtol=lse_tolerance, atol=lse_tolerance, msg=level)
