"""Says of a node of the autograd graph what it does to a signal, by the name of the node, so that what no site accounts for can be named.

The table lists what is *accounted for*: nodes through which a gradient passes as through a linear function. These are views, copies, sums, products
(with a constant, with a weight, or of two signals: for each of them the other one is a factor), reductions, the choice of elements by an index, and
interpolation. Normalisations, max pooling, sorting and losses are accounted for too, although they are not linear. A normalisation has no plateau.
Each output of a pool, of a maximum over an axis and of a sort passes its whole gradient to one input. What a loss does to its input is no activation.
Every node that is not in the table is named, whatever it is, so that a function which a later torch adds is named once too often rather than missed.

Four things show only from the nodes around one:

- A normalisation that is written by hand is a root, a reciprocal or a divisor that comes from a reduction (a mean, a sum, a norm) of squares.
- A product of a signal with itself is a square.
- The logarithm of a sum of exponentials is one function, as torch.logsumexp is.
- A function of a parameter alone (as `exp(A_log)`) has no signal in it.
"""

from __future__ import annotations

import re

from torch.autograd.graph import Node

from torchsat import internals

_ACTIVATION = re.compile(
    r"(Sigmoid|Tanh|Relu|LeakyRelu|PreluKernel|RreluWithNoise\w*|Elu|Celu|Gelu|Silu|Mish|Softplus|Hardtanh|Hardsigmoid|Hardswish|LogSigmoid|"
    r"Softshrink|Hardshrink|Threshold|\w*Softmax|Glu|\w*Attention\w*|ScaledDotProduct\w*|\w*Rnn\w*|\w*ThnnFused\w*|LstmMps)"
)
_ACCOUNTED: dict[str, str] = {
    "views and copies": (
        "AccumulateGrad Alias AsStrided AsStridedScatter BlockDiag Cat ChannelShuffle Chunk Clone Coalesce Col2Im Complex Conj ConjPhysical "
        "ConstantPadNd CopyBackwards CopySlices DiagEmbed Diagonal DiagonalScatter Error Expand Fill Flip GraphRoot Im2Col LazyClone Lift "
        "LiftFresh MkldnnReshape NarrowCopy NegView PackPaddedSequence Permute PinMemory PixelShuffle PixelUnshuffle ReflectionPad1D "
        "ReflectionPad2D ReflectionPad3D Repeat ReplicationPad1D ReplicationPad2D ReplicationPad3D ReshapeAlias ReshapeCopy Roll Rot90 "
        "Select SelectScatter Slice SliceInverse SliceScatter SparseCompressedTensor SparseCooTensorWithDimsAndTensors SparseMask Split "
        "SplitWithSizes Squeeze Stack T ToCopy ToDense ToMkldnn ToPaddedTensor ToSparse ToSparseBsc ToSparseBsr ToSparseCsc ToSparseCsr "
        "Transpose Tril Triu Unbind UndefinedGrad Unfold UnsafeSplit UnsafeSplitWithSizes UnsafeView Unsqueeze Values View ViewAsComplex "
        "ViewAsReal Zero"
    ),
    "sums, products and what draws random numbers": (
        "Add Addbmm Addcmul Addmm Addmv Addr Baddbmm Bernoulli Bmm Cauchy ConvDepthwise2D ConvDepthwise3D ConvTbc Convolution "
        "ConvolutionOverrideable CudnnConvolution CudnnConvolutionTranspose Cumsum Deg2Rad Dot Exponential FftC2C FftC2R FftR2C "
        "FusedDropout Geometric GroupedMm Ldexp Lerp LinalgCross Linear LogNormal Matmul MiopenConvolution MiopenConvolutionTranspose "
        "MiopenDepthwiseConvolution MkldnnConvolution MkldnnLinear Mm MpsConvolution MpsConvolutionTranspose Mul Mv NativeDropout Neg "
        "NnpackSpatialConvolution Normal Poisson Rad2Deg Random Rsub SlowConv2D SlowConv3D SlowConvDilated2D SlowConvDilated3D "
        "SlowConvTranspose2D SlowConvTranspose3D SparseAddmm SparseMmReduceImpl SparseSampledAddmm SparseSparseMatmul Sub Trace Trilinear "
        "Uniform Vdot"
    ),
    "the choice of elements by an index": (
        "Embedding EmbeddingBag EmbeddingRenorm Gather Index IndexAdd IndexCopy IndexFill IndexPut IndexPutImpl IndexSelect MaskedFill "
        "MaskedScatter MaskedSelect MaxUnpool2D MaxUnpool3D Put Scatter ScatterAdd Take UnsafeIndex UnsafeIndexPut UnsafeMaskedIndex "
        "UnsafeMaskedIndexPutAccumulate Where"
    ),
    "reductions": (
        "Cdist Dist EuclideanDist IndexReduce LinalgVectorNorm Mean Nansum Norm Pdist ScatterReduce SegmentReduce SparseSum Std StdMean Sum "
        "Var VarMean"
    ),
    "averages and interpolation": (
        "AdaptiveAvgPool2D AdaptiveAvgPool3D AffineGridGenerator AvgPool2D AvgPool3D CudnnAffineGridGenerator CudnnGridSampler "
        "GridSampler2D GridSampler2DCpuFallback GridSampler3D MkldnnAdaptiveAvgPool2D UpsampleBicubic2D UpsampleBicubic2DAa "
        "UpsampleBilinear2D UpsampleBilinear2DAa UpsampleLanczos2DAa UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D "
        "UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D UpsampleTrilinear3D"
    ),
    "normalisations": (
        "BatchNormNoUpdate BatchNormWithUpdate CudnnBatchNorm FusedRmsNorm MiopenBatchNorm NativeBatchNorm NativeBatchNormLegit "
        "NativeBatchNormLegitNoTraining NativeGroupNorm NativeLayerNorm Renorm WeightNormInterface"
    ),
    "one input takes the whole gradient": (
        "AdaptiveMaxPool2D AdaptiveMaxPool3D Amax Amin Aminmax Fmod Frac FractionalMaxPool2D FractionalMaxPool3D Max MaxPool2D "
        "MaxPool2DWithIndices MaxPool3DWithIndices Min MkldnnMaxPool2D MkldnnMaxPool3D NanToNum Remainder Sort"
    ),
    "losses": (
        "BinaryCrossEntropy BinaryCrossEntropyWithLogits CtcLoss CudnnCtcLoss HuberLoss LogSoftmax MiopenCtcLoss MseLoss MultiMarginLoss "
        "MultilabelMarginLoss NllLoss NllLoss2D SmoothL1Loss SoftMarginLoss SparseLogSoftmax"
    ),
}
_LINEAR = frozenset(name for names in _ACCOUNTED.values() for name in names.split())
_VIEWS = frozenset((*_ACCOUNTED["views and copies"].split(), "BackwardHookFunction"))
_NORMALISATIONS = frozenset(_ACCOUNTED["normalisations"].split())
_ATTENTION = re.compile(r"_?(Safe|Sparse)?Softmax|\w*Attention\w*")
_CONTRACTION = re.compile(
    r"\w*Addmm|Mm|Bmm|Mv|Dot|Baddbmm|Addbmm|Addmv|\w*Conv\w*|(Mkldnn)?Linear|Trilinear|Embedding(Bag)?|GroupedMm|Index|IndexSelect|Gather|"
    r"\w*Rnn\w*|\w*ThnnFused\w*|LstmMps"
)
_REDUCTIONS = frozenset(_ACCOUNTED["reductions"].split())
_SIZES = _REDUCTIONS | {"Amax", "Amin", "Max", "Min", "ScatterAdd", "IndexAdd"}
"""What gives the size of a signal, over an axis or over the elements of a group."""
_SELECTIONS = frozenset(["Topk", "Kthvalue", "Median", "Nanmedian", "Mode", "Cummax", "Cummin", "Maximum", "Minimum", "Fmax", "Fmin"])
_STEPS = frozenset(["Sign", "Sgn", "Round", "Floor", "Ceil", "Trunc"])
_ROOTS = ("Sqrt", "Rsqrt", "Reciprocal", "Pow", "Clamp", "ClampMin", "ClampMax", "Maximum")
"""What a hand-written normalisation applies to the size of the signal."""
_BETWEEN = (*_ROOTS, "Div", "Mul", "Add", "Sub", "Expand", "View", "UnsafeView", "Unsqueeze", "Squeeze", "ToCopy", "Clone", "Index", "IndexSelect")
"""What may stand between that size and the place where the signal is divided by it."""

_ELEMENTWISE = frozenset(
    (
        *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cos", "Cosh", "Digamma", "Erf", "Erfc", "Erfinv", "Exp", "Exp2", "Expm1", "I0"),
        *("Lgamma", "Log", "Log10", "Log1P", "Log2", "Logit", "Pow", "Reciprocal", "Rsqrt", "Sin", "Sinc", "Sinh", "SpecialEntr", "SpecialErfcx"),
        *("SpecialLogNdtr", "SpecialNdtr", "Sqrt", "Tan"),
    )
)
"""The nodes of the functions that are measured where they are heard (functions.py)."""

UNHEARD = (
    "called where no hook of torch is heard: in a compiled or scripted function, in torch.ops, in a transform of torch.func, "
    "in another function of torch"
)
IN_TRANSFORM = "called in a transform of torch.func, whose tensors are not measured"
UNMEASURED = "its derivative is not measured: it is no function of one signal that acts on each element alone"
DIVISION = "a division by another signal: how its output depends on the divisor is not measured"
SELECTION = "which elements pass a gradient depends on their values, and that is not measured"
STEP = "it passes no gradient: its derivative is 0"
COMPILED = "a compiled function: what is fused in it runs no hook"
CUSTOM = "a custom autograd.Function: what it computes is not known"


def kind_of(node: Node) -> str:
    """The name of the function that made this node, such as `Tanh` for TanhBackward0. Some nodes have a name with namespaces of C++."""
    return re.sub(r"Backward\d*(AutogradNestedTensor\d*|AutogradCUDA\d*)?(_copy)?$", "", node.name().rpartition("::")[2])


def unaccounted(node: Node) -> tuple[str, str] | None:
    """A name for what this node computes, and why it is not measured; None for a node that is accounted for whatever comes before it."""
    kind, made_by = kind_of(node), internals.forward_class(node)
    if made_by is not None:
        if kind.startswith("CompiledFunction"):
            return "compiled", COMPILED
        return None if (made_by.__module__ or "").startswith("torch.") else (kind, CUSTOM)
    if _ACTIVATION.fullmatch(kind):
        return None if kind in _LINEAR else (kind, UNHEARD)
    if kind in _LINEAR or kind.endswith("Backward") or kind.startswith("Nested"):
        # A kind that ends so is the derivative of a function, in a graph that the user has differentiated.
        return ("square", UNHEARD) if _is_square(node) else None
    if kind == "Div" and _divisor(node) is None:
        return None
    reasons = {**dict.fromkeys(_SELECTIONS, SELECTION), **dict.fromkeys(_STEPS, STEP), **dict.fromkeys(_ELEMENTWISE, UNHEARD), "Div": DIVISION}
    return spelled("square" if _is_square(node) else kind), reasons.get(kind, UNMEASURED)


def is_view(node: Node) -> bool:
    """Whether a node passes its gradient on as it is: it views, casts, copies or joins tensors, or is one of torch's own that wrappers put in."""
    made_by = internals.forward_class(node)
    return kind_of(node) in _VIEWS if made_by is None else (made_by.__module__ or "").startswith("torch.nn.parallel")


def is_normalisation(node: Node) -> bool:
    """Whether a node is a normalisation, as torch has them."""
    return kind_of(node) in _NORMALISATIONS


def is_attention(node: Node) -> bool:
    """Whether a node is a softmax or a fused attention."""
    return _ATTENTION.fullmatch(kind_of(node)) is not None


def is_contraction(node: Node) -> bool:
    """Whether a node contracts its input with a weight, or selects rows of one."""
    return _CONTRACTION.fullmatch(kind_of(node)) is not None


def chosen(node: Node) -> tuple[str, str]:
    """The same for a node that keeps or drops elements by a condition which was computed from a signal."""
    return spelled(kind_of(node)), SELECTION


def is_generic(node: Node) -> bool:
    """Whether a node that is not accounted for is a mathematical function, and not an activation or a function of the user's own. Losses are made of
    such functions."""
    return internals.forward_class(node) is None and not _ACTIVATION.fullmatch(kind_of(node))


def is_leaf(node: Node) -> bool:
    """Whether this node stands for a tensor that nothing has computed. It adds what arrives to the gradient of that tensor."""
    return hasattr(node, "variable")


def comes_from_parameter(node: Node) -> bool:
    """Whether what this node made is a function of one parameter alone, or a parameter."""
    return is_leaf(node) or is_of_parameter(node)


def is_of_parameter(node: Node) -> bool:
    """Whether a node is a function of one parameter alone, or divides a parameter, as spectral norm does. A product does not count: its other factor
    may be data, which is not in the graph."""
    inputs = node.next_functions[:1] if kind_of(node) == "Div" else node.next_functions
    for _ in range(8):
        if len(inputs) != 1 or inputs[0][0] is None:
            return False
        if is_leaf(inputs[0][0]):
            return True
        inputs = inputs[0][0].next_functions
    return False


def normalised_by(node: Node) -> list[Node] | None:
    """For a root, a reciprocal or a division by the size of a signal, the nodes that compute that size; None for every other node.

    In `e / e.sum()`, a softmax that is written by hand, the exponential e above the line is none of them.
    """
    found = _size(_divisor(node) if kind_of(node) == "Div" else node if _is_root(node) else None)
    above = node.next_functions[0][0] if kind_of(node) == "Div" else None
    return None if found is None else [each for each in found if each is not above]


def summed_exponentials(node: Node) -> list[Node] | None:
    """For the logarithm of a sum of exponentials, the nodes of that sum and of the exponentials; None for every other node."""
    found = _size(node.next_functions[0][0]) if kind_of(node) == "Log" else None
    return found if found is not None and any(kind_of(each) == "Exp" for each in found) else None


def is_size(node: Node | None) -> bool:
    """Whether this node computes the size of a signal: a mean, a sum or a norm, maybe with a small number added, or the root of one."""
    return _size(node) is not None


def _is_root(node: Node) -> bool:
    """Whether a node may be the last step of a normalisation. A power is one if it is no whole number, or is below 0."""
    exponent = getattr(node, "_saved_exponent", None) if node.name() == "PowBackward0" else 0.5
    return kind_of(node) in _ROOTS and isinstance(exponent, (int, float)) and (exponent < 0 or exponent != int(exponent))


def _size(node: Node | None) -> list[Node] | None:
    """The nodes from this one back to a reduction, and the squares or magnitudes that are reduced; None where there is no reduction."""
    path = list[Node]()
    for _ in range(12):
        if node is None:
            return None
        path.append(node)
        inputs = [before for before, _ in node.next_functions if before is not None and not is_leaf(before)]
        if kind_of(node) in _SIZES:
            return path + [each for each in inputs if _is_square(each) or kind_of(each) in ("Abs", "Exp")]
        if not (kind_of(node) in _BETWEEN and len(set(inputs)) == 1):
            return None
        node = inputs[0]
    return None


def _divisor(node: Node) -> Node | None:
    inputs = node.next_functions
    return inputs[1][0] if len(inputs) > 1 else None


def _is_square(node: Node) -> bool:
    """Whether this is `x ** 2`, or `x * x` of one and the same signal."""
    if kind_of(node) == "Pow":
        # The exponent of the other nodes of that name is a saved tensor, and to read it would run the user's hooks on saved tensors.
        return node.name() == "PowBackward0" and getattr(node, "_saved_exponent", None) == 2
    inputs = node.next_functions
    return kind_of(node) == "Mul" and len(inputs) == 2 and inputs[0] == inputs[1] and inputs[0][0] is not None


def spelled(kind: str) -> str:
    """The name of a function as torch spells it: `log_softmax` for LogSoftmax. Only characters of a place are left."""
    if kind.startswith("Clamp"):
        return "clamp"
    return re.sub(r"[^A-Za-z0-9_.-]", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower())
