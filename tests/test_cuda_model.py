"""The model that predicts speed from machine code: its parts on code made by hand, and on a compiled kernel."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from scripts import script

from hf_kvquant import KVQuantConfig
from hf_kvquant.measure.gpu import forecast, machine_code, warp_timing
from hf_kvquant.measure.gpu.machine_code import Flow, Instruction, parse, paths

# As nvdisasm writes it: a loop over two ways of different length, with a call of a copy and a product in each round.
LISTING = """
.text.other:
        /*0000*/                   EXIT ;                                   /* 0x000000000000794d */
                                                                            /* 0x000fea0003800000 */
//--------------------- .text.toy ---------------------
.text.toy:
        /*0000*/                   S2R R7, SR_CTAID.Z ;                     /* 0x0000000000077919 */
                                                                            /* 0x000e220000002700 */
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;      /* 0x0000000000077919 */
                                                                            /* 0x000fe20000000a00 */
        /*0020*/               @P1 BRA `(.L_x_2) ;                          /* 0x0000000000501947 */
                                                                            /* 0x000fea0003800000 */
        /*0030*/                   FADD R4, R4, R7 ;                        /* 0x0000000704048221 */
                                                                            /* 0x001fcc0000000000 */
        /*0040*/                   FADD R4, R4, R7 ;                        /* 0x0000000704048221 */
                                                                            /* 0x001fcc0000000000 */
.L_x_2:
        /*0050*/                   HMMA.16816.F32 R4, R4, R8, R4 ;          /* 0x0000000704048221 */
                                                                            /* 0x001fcc0000000000 */
        /*0060*/              @!P0 BRA `(.L_x_1) ;                          /* 0x0000000000501947 */
                                                                            /* 0x000fea0003800000 */
        /*0070*/                   STG.E [R2.64], R4 ;                      /* 0x0000000000077919 */
                                                                            /* 0x000fe20000000a00 */
        /*0080*/                   EXIT ;                                   /* 0x000000000000794d */
                                                                            /* 0x000fea0003800000 */
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);                           /* 0x0000000000501947 */
                                                                            /* 0x000fea0003800000 */
"""


def copies(one: Instruction) -> bool:
    return one.opcode == "LDGSTS"


def multiplies(one: Instruction) -> bool:
    return one.opcode == "HMMA"


class TestMachineCode:
    def test_instructions_and_their_waits(self):
        code = parse(LISTING, "toy")
        assert [one.opcode for one in code[:4]] == ["S2R", "LDGSTS", "BRA", "FADD"]
        assert code[0].sets == (0, None) and code[0].stall == 1 and code[0].waits == 0
        assert code[3].waits == 1 and code[3].stall == 6 and code[3].sets == (None, None)
        assert code[2].target == 5 and code[2].predicate == "@P1" and code[2].is_conditional
        assert parse(LISTING, "other")[0].opcode == "EXIT"
        with pytest.raises(ValueError, match="'third' is not in the machine code"):
            parse(LISTING, "third")

    def test_the_shortest_way_around(self):
        found = paths(parse(LISTING, "toy"), [copies, multiplies])
        assert [one.opcode for one in found.before] == ["S2R"]
        assert [one.opcode for one in found.loop] == ["LDGSTS", "BRA", "HMMA", "BRA"]
        assert [one.opcode for one in found.after] == ["STG", "EXIT"]
        # Both branches are taken there; on the longer way one is not.
        assert all(one.target is not None for one in found.loop if one.opcode == "BRA")
        longer = paths(parse(LISTING, "toy"), [copies, multiplies, lambda one: one.opcode == "FADD"]).loop
        assert [one.target for one in longer if one.opcode == "BRA"] == [None, 1]
        with pytest.raises(ValueError, match="no loop has all"):
            paths(parse(LISTING, "toy"), [lambda one: one.opcode == "MUFU"])

    def test_rare_branches_are_not_followed(self):
        code = [Instruction("BRA.DIV UR4, `(.L_x_9)", target=0), Instruction("EXIT")]
        assert Flow(code).follow == [[1], []]

    def test_a_call_of_a_label_is_a_branch(self):
        """Code for sm_80 leaves long loops so; a call of a subroutine returns."""
        out = Instruction("CALL.REL.NOINC `(.L_x_1)", predicate="@P1", target=3)
        code = [Instruction("FADD"), out, Instruction("BRA `(.L_x_0)", target=0), Instruction("EXIT")]
        assert Flow(code).follow == [[1, 2], [0], []]
        subroutine = Instruction("CALL.REL.NOINC `($__internal_4_$__cuda_sm20_div_rn_f64_full)")
        assert Flow([subroutine, Instruction("EXIT")]).follow == [[]]


def chain(text: str, n: int, stall: int = 1) -> list[Instruction]:
    return [Instruction(text, stall=stall)] * n


class TestWarps:
    def test_stalls_bind_one_warp_and_pipes_many(self):
        """100 products, 6 cycles apart for a warp alone; a tensor core takes one in 4 (sm_90) or 32 (sm_86) cycles."""
        path = chain("HMMA.16816.F32", 100, stall=6)
        assert warp_timing.round_cycles(path, "sm_90") == 600
        assert warp_timing.round_cycles(path, "sm_90", 3) == pytest.approx(1200, rel=0.05)
        assert warp_timing.round_cycles(path, "sm_86", 3) == pytest.approx(9600, rel=0.05)

    def test_a_scoreboard_waits_for_the_result(self):
        load = Instruction("LDS R1, [R2]", sets=(0, None))
        waits = warp_timing.total_cycles([load, Instruction("FADD R1, R1, R1", waits=1)], "sm_90")
        # The last of four warps waits for the accesses of the others, too.
        assert waits == warp_timing.LATENCY["LDS"] + warp_timing.SCHEDULERS
        assert warp_timing.total_cycles([load, Instruction("FADD R1, R1, R1", waits=2)], "sm_90") == 2

    def test_shared_memory_is_shared(self):
        """Two accesses of four wavefronts on each of four schedulers take 32 cycles of the multiprocessor."""
        path = [Instruction("LDSM.16.M88.4 R1, [R2]", sets=(0, None)), Instruction("LDS.128 R1, [R2]", sets=(0, None))]
        path += [Instruction("NOP", waits=1)]
        assert sum(map(warp_timing.wavefronts, path)) == 8
        assert warp_timing.round_cycles(path, "sm_90", 8) == pytest.approx(8 * 32, rel=0.05)

    def test_memory_bounds_copies(self):
        """A copy of 512 bytes, waited for one round later: half the latency for one warp, the bandwidth for many."""
        path = [Instruction("LDGSTS.E.128 [R1], [R2]"), Instruction("LDGDEPBAR"), Instruction("DEPBAR.LE SB0, 0x1")]
        one = warp_timing.round_cycles(path, "sm_90", copy_bytes=512, bytes_per_clock=1e9)
        assert one == pytest.approx(warp_timing.MEMORY_LATENCY / 2, rel=0.02)
        many = warp_timing.round_cycles(path, "sm_90", 4, copy_bytes=512, bytes_per_clock=8)
        assert many == pytest.approx(16 * 512 / 8, rel=0.02)

    def test_a_taken_branch_costs_more(self):
        path = [Instruction("BRA `(.L_x_1)", "@P0", target=0)] * 10
        assert warp_timing.total_cycles(path, "sm_90") == 10 * (1 + warp_timing.TAKEN_BRANCH)
        assert warp_timing.total_cycles([replace(one, target=None) for one in path], "sm_90") == 10


class TestForecast:
    def test_waves(self):
        """Blocks alone take 10 cycles, two beside each other 15."""
        times = lambda beside, running: (10.0, 15.0)[beside - 1]  # noqa: E731
        assert forecast.schedule(3, 1, 4, times) == 10
        assert forecast.schedule(5, 1, 4, times) == 20
        assert forecast.schedule(8, 2, 4, times) == 15
        # The fifth begins with the first four, beside one of them.
        assert forecast.schedule(5, 2, 4, times) == 15
        # After the first wave one is left, and is alone.
        assert forecast.schedule(9, 2, 4, times) == 25
        # Of four that are left, each is alone.
        assert forecast.schedule(12, 2, 4, times) == 25

    def test_running_blocks_share_the_memory(self):
        """Each takes as many cycles as blocks run; the last one runs alone."""
        assert forecast.schedule(4, 1, 4, lambda beside, running: running) == 4
        assert forecast.schedule(5, 1, 4, lambda beside, running: running) == 5
        assert forecast.schedule(5, 2, 4, lambda beside, running: running) == 5

    def test_columns_of_a_tile(self):
        copy = Instruction("LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64]")
        assert forecast.tile_columns([copy] * 8, 256) == 16
        assert forecast.tile_columns([copy] * 8, 128) == 32
        # 5 rows of 96 bytes at once, by 30 of 32 lanes.
        assert forecast.tile_columns([copy] * 8, 192) == 16

    def test_blocks_of_a_multiprocessor(self):
        toy = forecast.Kernel("sm_90", None, None, 168, 45952, 4, 16, 266)
        assert toy.blocks(forecast.GPUS["H200"]) == 3
        assert toy.blocks(forecast.GPUS["RTX 3090"]) == 2
        assert replace(toy, registers=128).blocks(forecast.GPUS["H200"]) == 4

    def test_more_bytes_take_longer(self):
        """A kernel of the toy's paths: the times of memory, of a second wave and of longer merges are in the sum."""
        code = paths(parse(LISTING, "toy"), [copies, multiplies])
        loads = replace(code, loop=[Instruction("LDG.E.128 R1, [R2.64]", sets=(0, None)), Instruction("NOP", waits=1)])
        toy = forecast.Kernel("sm_90", code, loads, 168, 45952, 4, 16, 266)
        gpu = forecast.GPUS["H200"]
        times = [forecast.call_us(toy, gpu, 1, context) for context in (4096, 65536, 1 << 20)]
        assert all(b > a for a, b in itertools.pairwise(times))
        bytes_us = 8 * (1 << 20) * 266 / gpu.read_gb_per_s * 1e-3
        assert times[-1] > bytes_us
        assert forecast.call_us(toy, gpu, 1, 65536, split=128) > times[1]  # eight times as many slices to merge
        row = forecast.call_facts("int8", toy, gpu, 1, 65536)
        assert row["us"] == times[1] and row["met"] == (row["us"] <= row["limit_us"] and row["over_bf16"] <= 0.54)
        assert forecast.call_facts("int8", toy, gpu, 1, 1024)["limit_us"] is None
        hidden = forecast.START_US - forecast.BETWEEN_US + forecast.HIDDEN_US
        assert row["us_in_step"] == pytest.approx(row["us"] - hidden)
        before = replace(toy, arch="sm_80")
        alone, in_step = (forecast.call_us(before, gpu, 1, 65536, in_step=x) for x in (False, True))
        assert in_step == pytest.approx(alone - forecast.START_US + forecast.BETWEEN_US)


@pytest.mark.skipif(forecast.missing() is not None, reason=f"{forecast.missing()}")
def test_the_script(capsys, tmp_path, monkeypatch):
    cuda_model = script("cuda_model")
    monkeypatch.chdir(tmp_path)
    KVQuantConfig.preset("int4").to_yaml("mine.yaml")
    choice = ["--gpus", "H200", "--contexts", "1024,65536", "--batches", "1"]
    assert cuda_model.main(["--presets", "int4,mine.yaml", *choice]) == 0
    told = capsys.readouterr().out
    assert "UNCALIBRATED" in told and "H200" in told and told.count("int4") == told.count("mine.yaml") == 3
    calls = [line.split() for line in told.splitlines() if line.split()[:1] == ["H200"]][-4:]
    with_goals, without = calls[:2], calls[2:]
    assert [row[2:6] for row in with_goals] == [row[2:6] for row in without]  # the times, too
    assert [row[-1] for row in without] == ["-", "-"] != [row[-1] for row in with_goals]
    with pytest.raises(SystemExit):
        cuda_model.main(["--gpus", "H900"])
    assert "--gpus: ['H900'] are unknown" in capsys.readouterr().err


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(machine_code, "program", lambda: None)
    with pytest.raises(RuntimeError, match="pip install 'nvidia-cuda-nvdisasm"):
        machine_code.disassembled(b"", "toy")
