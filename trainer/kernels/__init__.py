"""How are sparse products and selections computed fast, on a CPU and on a GPU?

    select        the active latents of a batch
    sparse        products with a sparse matrix of latents
    dense         the same on a full matrix
    operands      weight matrices in the number format of products
    portable      the kernels in torch's own operations
    cpu           the kernels for a CPU, by numba
    cuda cuda_rows cuda_select launch      the kernels for a GPU, in Triton

Imported by saes/ and training/.
"""
