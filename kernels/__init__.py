"""Device kernels of agentrt: KV block copy. Installed with the wheel as ``agentrt.kernels``.

| file | what it is |
|---|---|
| `kv_copy.py` | Triton: gather/scatter copy of blocks between any two memories the device can address |
| `kv_copy_bulk.cu` | CUDA C++, sm_90 and later: the same copy through a shared-memory ring of bulk copies |
| `kv_int8.py` | Triton: lossy transport, rows to int8 plus one float32 scale and back |
| `reference.py` | the same operations in plain NumPy; tests and machines without a GPU use it |

All kernels read one **table** of int64 words, uploaded once per launch:

    [ source id, destination id ] x n_pairs   negative id = padding, skipped
    [ base address of buffer b  ] x n_buffers   source pool
    [ base address of buffer b  ] x n_buffers   destination pool

Block `i` of buffer `b` begins at `base[b] + i * stride`. One buffer is one layer's K or V (or both); all layers of a
copy go in one launch. Importing this package imports neither torch nor triton; the two Triton files do.
"""
