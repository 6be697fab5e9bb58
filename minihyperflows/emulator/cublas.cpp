// The few functions of cuBLAS that the engine calls, in column-major order as there, by the
// definition. What the engine hands over (leading dimensions, transpositions, types) is checked.
#include "shim.h"

enum { R_32F = 0, R_16F = 2, R_16BF = 14, COMPUTE_32F = 68, COMPUTE_32F_TF32 = 77 };
enum { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };

struct Gemm {
    int transa, transb, m, n, k;
    float alpha, beta;
    const void *a, *b;
    void* c;
    int a_type, b_type, c_type, lda, ldb, ldc;
};

static int (*hook)(const Gemm*) = nullptr;  // returns 1 if it has recorded the call for later

static float load(const void* p, int type, std::size_t i) {
    if (type == R_32F) return static_cast<const float*>(p)[i];
    if (type == R_16F) return static_cast<const __half*>(p)[i];
    return static_cast<const __nv_bfloat16*>(p)[i];
}

static void store(void* p, int type, std::size_t i, float x) {
    if (type == R_32F) static_cast<float*>(p)[i] = x;
    else if (type == R_16F) static_cast<__half*>(p)[i] = __half(x);
    else static_cast<__nv_bfloat16*>(p)[i] = __nv_bfloat16(x);
}

// op(matrix), rows x columns, without gaps.
static std::vector<double> unpack(const void* p, int type, int rows, int columns, int ld,
                                  bool transposed) {
    std::vector<double> all(std::size_t(rows) * columns);
    for (int j = 0; j < columns; ++j)
        for (int i = 0; i < rows; ++i)
            all[i + std::size_t(j) * rows] =
                load(p, type, transposed ? j + std::size_t(i) * ld : i + std::size_t(j) * ld);
    return all;
}

extern "C" {

void emulator_set_hook(int (*f)(const Gemm*)) { hook = f; }

// C = alpha op(A) op(B) + beta C; op(A) is m x k, op(B) k x n; element (i, j) is at i + j ld.
void emulator_gemm(const Gemm* g) {
    const std::vector<double> a = unpack(g->a, g->a_type, g->m, g->k, g->lda, g->transa);
    const std::vector<double> b = unpack(g->b, g->b_type, g->k, g->n, g->ldb, g->transb);
    std::vector<double> sums(g->m);
    for (int j = 0; j < g->n; ++j) {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int l = 0; l < g->k; ++l) {
            const double factor = b[l + std::size_t(j) * g->k];
            const double* column = &a[std::size_t(l) * g->m];
            for (int i = 0; i < g->m; ++i) sums[i] += column[i] * factor;
        }
        for (int i = 0; i < g->m; ++i) {
            const std::size_t at = i + std::size_t(j) * g->ldc;
            const float before = g->beta == 0 ? 0 : g->beta * load(g->c, g->c_type, at);
            store(g->c, g->c_type, at, float(g->alpha * sums[i]) + before);
        }
    }
}

int cublasCreate_v2(void** handle) {
    *handle = new int(0);
    return SUCCESS;
}

int cublasDestroy_v2(void* handle) {
    delete static_cast<int*>(handle);
    return SUCCESS;
}

int cublasSetStream_v2(void* handle, void*) { return handle ? SUCCESS : 1; }

int cublasSetWorkspace_v2(void* handle, void*, std::size_t) { return handle ? SUCCESS : 1; }

int cublasSetMathMode(void* handle, int) { return handle ? SUCCESS : 1; }

int cublasGetVersion_v2(void*, int* version) {
    *version = 0;
    return SUCCESS;
}

int cublasGemmEx(void* handle, int transa, int transb, int m, int n, int k, const void* alpha,
                 const void* a, int a_type, int lda, const void* b, int b_type, int ldb,
                 const void* beta, void* c, int c_type, int ldc, int compute, int) {
    if (!handle) return 1;
    if (m < 0 || n < 0 || k < 0) return INVALID_VALUE;
    if (lda < (transa ? k : m) || ldb < (transb ? n : k) || ldc < m) return INVALID_VALUE;
    if (compute != COMPUTE_32F && compute != COMPUTE_32F_TF32) return NOT_SUPPORTED;
    const bool same = a_type == b_type && (c_type == a_type || c_type == R_32F);
    if (!same) return NOT_SUPPORTED;
    const Gemm g{transa, transb, m, n, k, *static_cast<const float*>(alpha),
                 *static_cast<const float*>(beta), a, b, c, a_type, b_type, c_type, lda, ldb, ldc};
    if (!hook || !hook(&g)) emulator_gemm(&g);
    return SUCCESS;
}

}  // extern "C"
