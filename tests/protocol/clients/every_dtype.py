"""What all client scripts send: two rows of every datatype."""

import numpy as np

DTYPES = {
    "BOOL": np.bool_, "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "FP16": np.float16, "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip
TEXT = np.array(["grüße", ""], dtype=object)


def rows():
    """Datatype → array of shape (2, 2), at the ends of each type's range."""
    made = {}
    for name, dtype in DTYPES.items():
        kind = np.dtype(dtype).kind
        if kind == "b":
            made[name] = np.array([[True, False], [False, True]])
        elif kind in "iu":
            limits = np.iinfo(dtype)
            made[name] = np.array([[limits.min, limits.max], [0, 1]], dtype)
        else:
            limits = np.finfo(dtype)
            made[name] = np.array([[limits.min, limits.max], [limits.tiny, -0.5]], dtype)
    return made
