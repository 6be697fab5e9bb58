// What CUDA C++ adds to C++, for a host compiler: enough to run the project's kernels on a CPU.
//
// A block's threads run one after another. A kernel with barriers runs each thread as a fiber (a
// stack of its own) that hands over at __syncthreads(); when all have arrived there they go on, one
// after another. Blocks run one after another too, in the order of their index or backwards: a
// kernel's result must not depend on that.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static  // one block runs at a time
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

// -- half precision ------------------------------------------------------------------------------

struct __half {
    _Float16 value;
    __half() = default;
    __half(float x) : value(static_cast<_Float16>(x)) {}
    __half(double x) : value(static_cast<_Float16>(x)) {}
    __half(int x) : value(static_cast<_Float16>(x)) {}
    operator float() const { return static_cast<float>(value); }
};

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        uint32_t word;
        std::memcpy(&word, &x, 4);
        if (!std::isnan(x)) word += 0x7fff + ((word >> 16) & 1);  // to nearest, ties to even
        bits = static_cast<uint16_t>(word >> 16);
    }
    operator float() const {
        const uint32_t word = static_cast<uint32_t>(bits) << 16;
        float x;
        std::memcpy(&x, &word, 4);
        return x;
    }
};

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return __half(x); }

// -- functions -----------------------------------------------------------------------------------

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline void __threadfence() {}
template <typename T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address = before + value;
    return before;
}
template <typename T>
T atomicMax(T* address, T value) {
    const T before = *address;
    *address = std::max(before, value);
    return before;
}
template <typename T>
T atomicMin(T* address, T value) {
    const T before = *address;
    *address = std::min(before, value);
    return before;
}
template <typename T>
T atomicOr(T* address, T value) {
    const T before = *address;
    *address = before | value;
    return before;
}

// -- threads -------------------------------------------------------------------------------------

namespace emulator {

constexpr std::size_t STACK = 64 * 1024;

// One of a block's threads: a stack, and where it goes on. It is entered once through ucontext's
// functions; from then on by long jumps, which leave the signal mask alone and so need no system
// call. When the thread ends, the fiber waits to be the same thread of the next block.
struct Fiber {
    std::vector<char> stack = std::vector<char>(STACK);
    ucontext_t entry;
    jmp_buf place;
    bool started = false, finished = false;
};

static ucontext_t scheduler_entry;
static jmp_buf scheduler;
static std::vector<Fiber> fibers;
static std::size_t running;
static int barrier_line;  // where the thread that ran last waits
static void (*body)(void*);
static void* body_data;

inline dim3 place(std::size_t i) {
    dim3 t;
    t.x = i % blockDim.x;
    t.y = i / blockDim.x % blockDim.y;
    t.z = i / (blockDim.x * blockDim.y);
    return t;
}

// Goes back to the scheduler until the fiber is resumed.
inline void pause() {
    if (_setjmp(fibers[running].place) == 0) _longjmp(scheduler, 1);
}

inline void fiber_main() {
    for (;;) {
        body(body_data);
        fibers[running].finished = true;
        pause();
    }
}

inline void enter(Fiber& fiber) {
    fiber.started = true;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.data();
    fiber.entry.uc_stack.ss_size = STACK;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, fiber_main, 0);
    swapcontext(&scheduler_entry, &fiber.entry);
}

// Runs a thread up to its next barrier or its end.
inline void resume(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    enter(fiber);
}

enum Result { DONE = 0, ENDED_AT_BARRIER = 1, DIFFERENT_BARRIERS = 2 };

// Lets each of the threads that are left run up to a barrier or to its end.
inline Result run_to_barrier(std::size_t threads, std::size_t& left) {
    std::size_t ended = 0;
    int first_line = 0;
    bool different = false;
    for (running = 0; running < threads; ++running) {
        threadIdx = place(running);
        resume(fibers[running]);
        ended += fibers[running].finished;
        if (running == 0) first_line = barrier_line;
        different |= barrier_line != first_line;
    }
    if (ended != 0 && ended != left) return ENDED_AT_BARRIER;
    if (ended == 0 && different) return DIFFERENT_BARRIERS;
    left -= ended;
    return DONE;
}

inline Result run_block_with_barriers(std::size_t threads) {
    fibers.resize(std::max(fibers.size(), threads));
    for (std::size_t i = 0; i < threads; ++i) fibers[i].finished = false;
    Result result = DONE;
    for (std::size_t left = threads; left > 0 && result == DONE;)
        result = run_to_barrier(threads, left);
    if (result != DONE) fibers.clear();  // some are inside the kernel still
    return result;
}

inline Result run_block(std::size_t threads, bool barriers) {
    if (barriers) return run_block_with_barriers(threads);
    for (std::size_t i = 0; i < threads; ++i) {
        threadIdx = place(i);
        body(body_data);
    }
    return DONE;
}

inline Result run_grid(const unsigned* grid, const unsigned* block, bool barriers,
                       bool backwards) {
    gridDim.x = grid[0], gridDim.y = grid[1], gridDim.z = grid[2];
    blockDim.x = block[0], blockDim.y = block[1], blockDim.z = block[2];
    const std::size_t blocks = std::size_t(grid[0]) * grid[1] * grid[2];
    const std::size_t threads = std::size_t(block[0]) * block[1] * block[2];
    Result result = DONE;
    for (std::size_t k = 0; k < blocks && result == DONE; ++k) {
        const std::size_t i = backwards ? blocks - 1 - k : k;
        blockIdx.x = i % grid[0];
        blockIdx.y = i / grid[0] % grid[1];
        blockIdx.z = i / (std::size_t(grid[0]) * grid[1]);
        result = run_block(threads, barriers);
    }
    return result;
}

// Called as __syncthreads(), in the line of that name. All threads must wait in the same one.
inline void barrier(int line) {
    barrier_line = line;
    pause();
}

// -- calling a kernel with the arguments that the driver's launch function would get -------------

template <typename... P>
struct Call {
    void (*kernel)(P...);
    void** arguments;
    template <std::size_t... I>
    void apply(std::index_sequence<I...>) {
        kernel(*static_cast<std::remove_const_t<P>*>(arguments[I])...);
    }
    static void run(void* self) {
        static_cast<Call*>(self)->apply(std::index_sequence_for<P...>{});
    }
};

template <typename... P>
int launch(void (*kernel)(P...), const unsigned* grid, const unsigned* block, void** arguments,
           bool barriers, bool backwards) {
    Call<P...> call{kernel, arguments};
    body = Call<P...>::run;
    body_data = &call;
    return run_grid(grid, block, barriers, backwards);
}

// A letter for each type, so that the caller's arguments can be checked against the parameters.
template <typename T>
std::string letter() {
    using U = std::remove_cv_t<T>;
    if constexpr (std::is_pointer_v<U>) return "*" + letter<std::remove_pointer_t<U>>();
    else if constexpr (std::is_same_v<U, float>) return "f";
    else if constexpr (std::is_same_v<U, double>) return "d";
    else if constexpr (std::is_same_v<U, __half>) return "e";
    else if constexpr (std::is_same_v<U, bool>) return "?";
    else if constexpr (std::is_integral_v<U>)
        return (std::is_signed_v<U> ? "i" : "u") + std::to_string(sizeof(U));
    else return "x";
}

template <typename... P>
std::string signature(void (*)(P...)) {
    std::string all;
    ((all += letter<P>() + " "), ...);
    return all;
}

}  // namespace emulator

#define __syncthreads() emulator::barrier(__LINE__)
