"""One measurement of the peer, in a process of its own: the only module that needs PyTorch."""

import gc
import json
import math
import statistics
import sys
import time

import torch

from peer.search import search
from peer.shapes import CONTEXT, GIB, LENGTH, PEER_MODELS, PRODUCTS

BF16 = torch.bfloat16


def emit(**record):
    print("@@ " + json.dumps(record), flush=True)


def bench(work, calls, repeat=7, warm=3):
    """Median milliseconds of a call, each time over several calls, by CUDA's events."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


def scan(task):
    import selective_scan_cuda
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    e, n = 2048, 16
    for b in task["batches"]:
        wide = lambda: torch.randn(b, e, LENGTH, device="cuda", dtype=BF16)
        narrow = lambda: torch.randn(b, 1, n, LENGTH, device="cuda", dtype=BF16)
        u, z, dy, B, C = wide(), wide(), wide(), narrow(), narrow()
        delta = (0.5 * torch.rand(b, e, LENGTH, device="cuda")).to(BF16)
        A = -torch.arange(1, n + 1, device="cuda", dtype=torch.float32).repeat(e, 1)
        D = torch.randn(e, device="cuda")
        # Step sizes drawn log-uniformly from 0.001 to 0.1, as at the start of training.
        step = torch.exp(torch.rand(e, device="cuda") * math.log(100) + math.log(0.001))
        bias = torch.log(torch.expm1(step))
        forward = lambda: selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, True)
        out, states, _ = forward()
        backward = lambda: selective_scan_cuda.bwd(
            u, delta, A, B, C, D, z, bias, dy, states, out, None, True, False
        )
        leaves = [t.detach().requires_grad_() for t in (u, delta, A, B, C, D, z, bias)]
        both = lambda: torch.autograd.grad(selective_scan_fn(*leaves, True), leaves, dy)
        calls = max(2, 8 // b)
        emit(batch=b, forward=bench(forward, calls), backward=bench(backward, calls),
             both=bench(both, calls))


def gemm(task):
    m = task["rows"]
    for name, k, n in PRODUCTS:
        x = torch.randn(m, k, device="cuda", dtype=BF16)
        dy = torch.randn(m, n, device="cuda", dtype=BF16)
        w = torch.randn(n, k, device="cuda", dtype=BF16)
        for which, work in (
            ("y", lambda: torch.matmul(x, w.t())),
            ("dX", lambda: torch.matmul(dy, w)),
            ("dW", lambda: torch.matmul(dy.t(), x)),
        ):
            ms = bench(work, 10)
            emit(layer=name, which=which, ms=ms, rate=2 * m * k * n / ms / 1e9)


def cap(task):
    """Holds the allocator to the limit without the context."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (task["limit"] - CONTEXT) * GIB / total))


def build(name, dtype):
    """A model of mamba-ssm's with random weights."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=256, ssm_cfg={"layer": "Mamba1", "d_state": 16, "d_conv": 4, "expand": 2},
        rms_norm=True, residual_in_fp32=True, fused_add_norm=True,
        pad_vocab_size_multiple=8, tie_embeddings=True, **PEER_MODELS[name],
    )
    return MambaLMHeadModel(config, device="cuda", dtype=dtype)


class Trainer:
    def __init__(self, name):
        self.model = build(name, torch.float32)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def logits(self, ids, checkpointed):
        """The model's own forward pass, its first layers checkpointed."""
        from mamba_ssm.ops.triton.layer_norm import layer_norm_fn
        from torch.utils.checkpoint import checkpoint

        if not checkpointed:
            return self.model(ids).logits
        stack = self.model.backbone
        hidden, residual = stack.embedding(ids), None
        for i, layer in enumerate(stack.layers):
            if i < checkpointed:
                hidden, residual = checkpoint(
                    layer, hidden, residual, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden, residual = layer(hidden, residual)
        hidden = layer_norm_fn(
            hidden, stack.norm_f.weight, stack.norm_f.bias, eps=stack.norm_f.eps,
            residual=residual, prenorm=False, residual_in_fp32=True, is_rms_norm=True,
        )
        return self.model.lm_head(hidden)

    def step(self, batch, checkpointed, length=LENGTH):
        x = torch.randint(0, 256, (batch, length + 1), device="cuda")
        inputs, targets = x[:, :-1].contiguous(), x[:, 1:].reshape(-1)
        with torch.autocast("cuda", BF16):
            logits = self.logits(inputs, checkpointed)
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 256).float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def fits(self, work):
        """Whether memory suffices for `work`; clears up behind it."""
        try:
            work()
            torch.cuda.synchronize()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            # The error's traceback holds tensors until the handler is left.
            self.optimizer.zero_grad(set_to_none=True)


def clear():
    """Gives memory back: before a record is emitted, so that it is not in the next one's peak."""
    gc.collect()
    torch.cuda.empty_cache()


def step(task):
    cap(task)
    trainer = Trainer(task["model"])
    for batch, checkpointed in task["steps"]:
        times = []

        def work():
            for i in range(2 + task["repeat"]):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                trainer.step(batch, checkpointed)
                end.record()
                end.synchronize()
                if i >= 2:
                    times.append(begin.elapsed_time(end))

        ok = trainer.fits(work)
        ms = statistics.median(times) if ok else None
        clear()
        emit(batch=batch, checkpointed=checkpointed, ms=ms,
             rate=batch * LENGTH / ms * 1e3 if ok else None)


def longest(task):
    cap(task)
    begin = time.monotonic()
    trainer = Trainer(task["model"])
    layers = PEER_MODELS[task["model"]]["n_layer"]
    # AdamW's moments come into being in the first step.
    trainer.step(1, layers)
    clear()

    def fits(length):
        ok = trainer.fits(lambda: trainer.step(1, layers, length))
        clear()
        emit(length=length, fits=ok)
        return ok

    # Half of the time at most is left unused: what a try takes grows with the length.
    search(fits, 2 * LENGTH, lambda: time.monotonic() - begin > 0.7 * task["seconds"])


def start(task):
    trainer = Trainer(task["model"])
    begin = time.time()
    trainer.step(1, 0)
    torch.cuda.synchronize()
    emit(wall=time.time() - task["launched"], step=time.time() - begin)


def prefill(task):
    from mamba_ssm.utils.generation import InferenceParams

    model = build("353M", BF16).eval()
    ids = torch.randint(0, 256, (1, LENGTH), device="cuda")
    with torch.inference_mode():
        work = lambda: model(
            ids, num_last_tokens=1,
            inference_params=InferenceParams(max_seqlen=LENGTH + 1, max_batch_size=1),
        )
        emit(ms=bench(work, 1))


def decode(task):
    """`generate` with CUDA graphs, by the clock, without the first call, which captures. In the
    format that is faster there: fp32 at batch 1 where the model is small, else BF16."""
    for name, batch, new in task["writing"]:
        dtype = torch.float32 if (name, batch) == ("353M", 1) else BF16
        model = build(name, dtype).eval()
        ids = torch.randint(0, 256, (batch, 64), device="cuda")
        times = []
        # A long text is written once: capturing is nothing beside it.
        lengths = [new] * 3 if new < 4096 else [new]
        warm = 64 + new if new < 4096 else 96
        model.generate(input_ids=ids, max_length=warm, cg=True, top_k=1)
        for length in lengths:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            model.generate(input_ids=ids, max_length=64 + length, cg=True, top_k=1)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        seconds = statistics.median(times)
        emit(model=name, batch=batch, new=new, rate=batch * new / seconds,
             note="fp32" if dtype == torch.float32 else "bf16")
        del model
        clear()


def run(task):
    """Does the task that `theirs.Peer` gave."""
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA device")
    tasks = {"scan": scan, "gemm": gemm, "step": step, "longest": longest, "start": start,
             "prefill": prefill, "decode": decode}
    tasks[task["task"]](task)
