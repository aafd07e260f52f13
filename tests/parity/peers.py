"""The two PyTorch implementations that this program is compared with, on a CPU.

mamba_ssm's modules are those of its source distribution, unpacked and not built: the modules are
plain PyTorch, and where they call a GPU kernel they get the reference function that mamba_ssm
tests that kernel against. transformers has a path of its own without kernels.
"""

import json
import os
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

BYTES = 256


def load_mamba_ssm(folder=None):
    """mamba_ssm's `models.mixer_seq_simple`, able to run on a CPU."""
    if "mamba_ssm" in sys.modules:
        return sys.modules["mamba_ssm.models.mixer_seq_simple"]
    # First, so that it finds no mamba_ssm, whose kernels it would call.
    import transformers.models.mamba.modeling_mamba  # noqa: F401

    folder = Path(folder or os.environ["MAMBA_SSM"])
    # The package's own __init__ loads all it has, Mamba-3 with its compilers included.
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(folder / "mamba_ssm")]
    sys.modules["mamba_ssm"] = package
    # The CUDA extension: imported by name, and never called below.
    sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    from mamba_ssm.models import mixer_seq_simple
    from mamba_ssm.modules import mamba_simple
    from mamba_ssm.ops import selective_scan_interface
    from mamba_ssm.ops.triton import layer_norm

    def rms_norm(x, weight, bias, residual=None, eps=1e-6, dropout_p=0.0, prenorm=False,
                 residual_in_fp32=False):
        return layer_norm.rms_norm_ref(x, weight, bias, residual, eps=eps, prenorm=prenorm)

    mamba_simple.selective_scan_fn = selective_scan_interface.selective_scan_ref
    # Without them the mixer does the same in plain PyTorch.
    mamba_simple.selective_state_update = None
    mamba_simple.causal_conv1d_fn = mamba_simple.causal_conv1d_update = None
    layer_norm.rms_norm_fn = rms_norm
    return mixer_seq_simple


def linear_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """`selective_scan_ref` for the arguments that Mamba-1 gives it, with a backward pass in time
    linear in L: there every `x[:, :, i]` gets a gradient as large as x.
    """
    delta = F.softplus(delta + delta_bias[..., None])
    decays = torch.exp(torch.einsum("bdl,dn->bdln", delta, A)).unbind(2)
    inputs = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u).unbind(2)
    state = A.new_zeros(())
    outputs = []
    for decay, added, output in zip(decays, inputs, C.unbind(2)):
        state = decay * state + added
        outputs.append(torch.einsum("bdn,bn->bd", state, output))
    return (torch.stack(outputs, dim=2) + u * D[:, None]) * F.silu(z)


def use_linear_scan():
    """Makes mamba_ssm's modules train in reasonable time; checked against its own function."""
    load_mamba_ssm()
    from mamba_ssm.modules import mamba_simple
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    def scan(*arguments, return_last_state=False, **options):
        return linear_scan(*arguments, **options)

    draw = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=draw)
    arguments = [random(2, 4, 9), random(2, 4, 9), -random(4, 3).exp(), random(2, 3, 9),
                 random(2, 3, 9), random(4), random(2, 4, 9), random(4), True]
    torch.testing.assert_close(scan(*arguments), selective_scan_ref(*arguments))
    mamba_simple.selective_scan_fn = scan


def mamba_ssm_model(config):
    """A `MambaLMHeadModel` from the keys of a `config.json`."""
    models = load_mamba_ssm()
    # One kernel for add and norm, where there is a GPU; the same sums in two steps here.
    config = {**config, "fused_add_norm": False}
    return models.MambaLMHeadModel(models.MambaConfig(**config), dtype=torch.float32)


def transformers_model(config):
    """A `MambaForCausalLM` from the keys of a `config.json`."""
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(**config)).float().eval()


def is_transformers(config):
    return "hidden_size" in config


def build(config):
    return transformers_model(config) if is_transformers(config) else mamba_ssm_model(config)


@torch.no_grad()
def randomise(model, seed):
    """Moves every parameter away from its initial value, so that each of them matters.

    A checkpoint fresh from the recipe has norms of one, biases of zero and the same rates in every
    channel: mixing those up would show nowhere.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("A_log", "mixer.D", "dt_proj.bias")):
            parameter += 0.3 * noise
        elif name.endswith(("norm.weight", "norm_f.weight")):
            parameter.copy_(1.0 + 0.2 * noise)
        elif "embedding" in name:
            parameter.copy_(0.5 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        elif name.endswith("conv1d.weight"):
            parameter.copy_(0.4 * noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)


@torch.no_grad()
def logits(model, data):
    """Logits after every byte of `data`, float32, (L, V)."""
    return model(torch.tensor([list(data)])).logits[0].float().numpy()


@torch.no_grad()
def stepwise(model, data):
    """The same, one byte at a time through mamba_ssm's cache."""
    load_mamba_ssm()
    from mamba_ssm.utils.generation import InferenceParams

    cache = InferenceParams(max_seqlen=len(data), max_batch_size=1)
    rows = []
    for byte in data:
        rows.append(model(torch.tensor([[byte]]), inference_params=cache).logits[0, 0].float())
        cache.seqlen_offset += 1
    return torch.stack(rows).numpy()


def state_dict(folder):
    """All tensors of a checkpoint folder in any of the usual forms."""
    from safetensors.torch import load_file

    folder = Path(folder)
    index = list(folder.glob("*.index.json"))
    if index:
        files = sorted(set(json.loads(index[0].read_text())["weight_map"].values()))
    else:
        files = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".safetensors")]
    tensors = {}
    for file in files:
        path = str(folder / file)
        load = load_file if file.endswith(".safetensors") else torch.load
        for name, tensor in load(path).items():
            # An export has both forms.
            assert torch.equal(tensors.setdefault(name, tensor), tensor), f"{name} of {folder}"
    return tensors


def load(folder):
    """The model of a checkpoint folder, in float32, as its own library reads it."""
    config = json.loads((Path(folder) / "config.json").read_text())
    if is_transformers(config):
        from transformers import MambaForCausalLM

        return MambaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = mamba_ssm_model(config)
    tensors = {name: tensor.float() for name, tensor in state_dict(folder).items()}
    model.load_state_dict(tensors)
    return model.eval()
