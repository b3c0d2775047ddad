"""The globals that a torch MACE file may name, and what to say about those it may not.

Full names only: a class of the same name in another package is another class. Collected from files
written by MACE 0.3.0 to 0.3.16, with every interaction, radial and readout block.
"""

import ml_dtypes
import numpy as np

STORAGES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.ByteStorage": np.dtype(np.uint8),  # states of random generators, in checkpoints
}

# What may be looked up with getattr, and where: protocol 2 writes torch.tanh and torch.abs as
# getattr(torch._C._VariableFunctionsClass, name), and so the schedule of stage two in checkpoints.
MEMBERS = {
    "torch._C._VariableFunctionsClass": frozenset({"abs", "sigmoid", "tanh"}),
    "torch.optim.swa_utils.SWALR": frozenset({"_cosine_anneal", "_linear_anneal"}),
}

# Mentioned as values, never called: activations and torch.fx's tracer.
MENTIONED = frozenset(
    {
        *MEMBERS,
        "torch.fx._symbolic_trace.Tracer",
        "torch.nn.functional.sigmoid",
        "torch.nn.functional.silu",
        "torch.nn.functional.tanh",
    }
)

CLASSES = frozenset(
    f"{module}.{name}"
    for module, names in {
        "torch.nn.modules.activation": "SiLU",
        "torch.nn.modules.container": "ModuleDict ModuleList ParameterList Sequential",
        "torch.nn.modules.linear": "Linear",
        "torch.nn.modules.normalization": "LayerNorm",
        "torch.nn.modules.sparse": "Embedding",
        "e3nn.math._normalize_activation": "normalize2mom",
        "e3nn.nn._activation": "Activation",
        "e3nn.nn._extract": "Extract",
        "e3nn.nn._fc": "FullyConnectedNet _Layer",
        "e3nn.nn._gate": "Gate _Sortcut",
        "e3nn.o3._irreps": "Irrep Irreps _MulIr",
        "e3nn.o3._linear": "Instruction Linear",
        "e3nn.o3._spherical_harmonics": "SphericalHarmonics",
        "e3nn.o3._tensor_product._instruction": "Instruction",
        "e3nn.o3._tensor_product._sub": "ElementwiseTensorProduct FullyConnectedTensorProduct",
        "e3nn.o3._tensor_product._tensor_product": "TensorProduct",
        "mace.modules.blocks": (
            "AtomicEnergiesBlock EquivariantProductBasisBlock GeneralNonLinearBiasReadoutBlock "
            "LinearNodeEmbeddingBlock LinearReadoutBlock NonLinearBiasReadoutBlock "
            "NonLinearReadoutBlock RadialEmbeddingBlock RealAgnosticAttResidualInteractionBlock "
            "RealAgnosticDensityInteractionBlock RealAgnosticDensityResidualInteractionBlock "
            "RealAgnosticInteractionBlock RealAgnosticResidualInteractionBlock "
            "RealAgnosticResidualNonLinearInteractionBlock ScaleShiftBlock"
        ),
        "mace.modules.embeddings": "GenericJointEmbedding",
        "mace.modules.gate": "GatedEquivariantBlock",
        "mace.modules.irreps_tools": "reshape_irreps",
        "mace.modules.models": "MACE ScaleShiftMACE",
        "mace.modules.radial": (
            "AgnesiTransform BesselBasis ChebychevBasis GaussianBasis PolynomialCutoff RadialMLP "
            "SoftTransform ZBLBasis"
        ),
        "mace.modules.symmetric_contraction": "Contraction SymmetricContraction",
        "mace.modules.wrapper_ops": "CuEquivarianceConfig OEQConfig",
    }.items()
    for name in names.split()
)

# Field names of e3nn's named tuples, which pickle stores by position.
FIELDS = {
    "e3nn.o3._linear.Instruction": ("i_in", "i_out", "path_shape", "path_weight"),
    "e3nn.o3._tensor_product._instruction.Instruction": (
        "i_in1",
        "i_in2",
        "i_out",
        "connection_mode",
        "has_weight",
        "path_weight",
        "path_shape",
    ),
}

_KIND = (
    "this kind of MACE model (dipoles, dielectric response, charges or LES) is not supported yet; "
    "give a MACE or ScaleShiftMACE model"
)
# By prefix of the full name.
REFUSED = {
    "cuequivariance": "the model is in cuEquivariance layout; convert it back to e3nn first, with "
    "mace.cli.convert_cueq_e3nn (mace_cueq_to_e3nn)",
    "openequivariance": "the model is in OpenEquivariance layout; save it again through "
    "mace_run_train, which converts it back to e3nn",
    "mace.modules.extensions.": _KIND,
    "mace.modules.field_blocks.": _KIND,
    "mace.modules.models.AtomicDi": _KIND,
    "mace.modules.models.EnergyDi": _KIND,
    "mace.modules.blocks.LinearDipole": _KIND,
    "mace.modules.blocks.NonLinearDipole": _KIND,
    "mace.modules.lora.": "the model was saved in the middle of a LoRA run; merge the adapters in "
    "torch first (mace.modules.lora.merge_lora_weights) and save it again",
    "mace_jax.": "it was written by mace-jax; give the torch .model file it was made from",
    "torch._dynamo.": "the model was saved after torch.compile; save model._orig_mod instead",
    "torch.nn.parallel.": "the model is wrapped for several devices; save model.module instead",
    "torch.optim.swa_utils.AveragedModel": "it is an average of models; save its .module instead",
    "mace.calculators.": "this is a wrapper around a model, such as LAMMPS uses; give the original "
    ".model file",
    "numpy.": "an attribute is a NumPy scalar; in torch, replace it by a Python number "
    "(such as block.avg_num_neighbors = float(...)) and save the model again",
}
