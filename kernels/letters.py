"""The page of axis letters and tensor types.

The same letters stand in signatures, einsum strings and kernels:

    B  batch (sequences)            T  tokens of one call
    D  width of the model           F  inner width of a channel mixer or a branch
    H  heads                        G  key-value heads or groups (G divides H)
    K  key/query width of a head    V  value width of a head
    N  state width                  W  taps of a short convolution
    C  tokens of a chunk            E  experts
    S  tokens that a cache holds    A  size of the alphabet (vocabulary)

A name below is a tensor of floats whose axes are those letters, in order. In the test run jaxtyping
checks the shapes of every call (`tests/conftest.py` installs its import hook); elsewhere, and where
jaxtyping is not installed, the names are plain `torch.Tensor` and cost nothing.
"""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    BT = Tensor
    BTD = Tensor
    BTF = Tensor
    BTH = Tensor
    BTHK = Tensor
    BTHV = Tensor
    BTGK = Tensor
    BTGV = Tensor
    BHKV = Tensor
    BTN = Tensor
    BD = Tensor
    BF = Tensor
    BH = Tensor
    BDW = Tensor
    BDN = Tensor
    DN = Tensor
    DW = Tensor
    H = Tensor
    HK = Tensor
    D = Tensor
    BTA = Tensor
    BTE = Tensor
    TokenIds = Tensor
    Scalar = Tensor
else:
    try:
        from jaxtyping import Float, Int
    except ImportError:
        Float = Int = None

    def _floats(axes: str) -> type:
        return Tensor if Float is None else Float[Tensor, axes]

    BT = _floats("B T")
    BTD = _floats("B T D")
    BTF = _floats("B T F")
    BTH = _floats("B T H")
    BTHK = _floats("B T H K")
    BTHV = _floats("B T H V")
    BTGK = _floats("B T G K")
    BTGV = _floats("B T G V")
    BHKV = _floats("B H K V")
    BTN = _floats("B T N")
    BD = _floats("B D")
    BF = _floats("B F")
    BH = _floats("B H")
    BDW = _floats("B D W")
    BDN = _floats("B D N")
    DN = _floats("D N")
    DW = _floats("D W")
    H = _floats("H")
    HK = _floats("H K")
    D = _floats("D")
    BTA = _floats("B T A")
    BTE = _floats("B T E")
    Scalar = _floats("")
    TokenIds = Tensor if Int is None else Int[Tensor, "B T"]
