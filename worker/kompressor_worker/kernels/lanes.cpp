// Vectors as wide as the CPU has them, in the types that g++ and clang++ share.
// Everything here is exact or correctly rounded as IEEE 754 says, so results do not depend on the CPU. No fast-math, no contraction.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
constexpr int64_t STEP = 16, PARTS = STEP / LANES;  // loops go by 16, so that sums are in the same order on every CPU
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef double D __attribute__((vector_size(4 * LANES)));
typedef float HalfF __attribute__((vector_size(2 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));
typedef uint8_t B __attribute__((vector_size(LANES)));

enum Dtype { BF16 = 0, FP16 = 1, FP32 = 2 };

template <class To, class From> inline To cast(From value) {
    static_assert(sizeof(To) == sizeof(From), "bits");
    To out;
    std::memcpy(&out, &value, sizeof out);
    return out;
}

// Widening and narrowing: spelt out where g++ 12 makes many instructions of what the CPU does in one or a few.
#if defined(__AVX512F__)
inline U widen(H h) { return cast<U>(_mm512_cvtepu16_epi32(cast<__m256i>(h))); }
inline U widen(B b) { return cast<U>(_mm512_cvtepu8_epi32(cast<__m128i>(b))); }
inline D widen(HalfF f) { return cast<D>(_mm512_cvtps_pd(cast<__m256>(f))); }
inline B narrow(U u) { return cast<B>(_mm512_cvtepi32_epi8(cast<__m512i>(u))); }
#elif defined(__AVX2__)
inline U widen(H h) { return cast<U>(_mm256_cvtepu16_epi32(cast<__m128i>(h))); }
inline U widen(B b) { return cast<U>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(cast<long long>(b)))); }
inline D widen(HalfF f) { return cast<D>(_mm256_cvtps_pd(cast<__m128>(f))); }
inline B narrow(U u) {
    const __m128i first = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i bytes = _mm256_shuffle_epi8(cast<__m256i>(u), _mm256_broadcastsi128_si256(first));
    return cast<B>(_mm_cvtsi128_si64(_mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1))));
}
#else
inline U widen(H h) { return __builtin_convertvector(h, U); }
inline U widen(B b) { return __builtin_convertvector(b, U); }
inline D widen(HalfF f) { return __builtin_convertvector(f, D); }
inline B narrow(U u) { return __builtin_convertvector(u, B); }
#endif

inline F splat(float value) { return F{} + value; }
inline U usplat(uint32_t value) { return U{} + value; }

inline F half_to_float(U h) {
    const U magnitude = h & 0x7fffu, exponent = magnitude >> 10;
    const F normal = cast<F>((magnitude << 13) + (112u << 23));
    const F subnormal = __builtin_convertvector(cast<I>(magnitude), F) * 0x1p-24f;
    const U special = (magnitude << 13) | 0x7f800000u;
    const U bits = exponent == 0 ? cast<U>(subnormal) : (exponent == 31 ? special : cast<U>(normal));
    return cast<F>(bits | ((h & 0x8000u) << 16));
}

template <int T> inline F load(const char* p) {
    if constexpr (T == FP32) {
        F f;
        std::memcpy(&f, p, sizeof f);
        return f;
    } else {
        H h;
        std::memcpy(&h, p, sizeof h);
        const U u = widen(h);
        return T == BF16 ? cast<F>(u << 16) : half_to_float(u);
    }
}

template <int T> constexpr int64_t width() { return T == FP32 ? 4 : 2; }

// The first `count` < LANES elements, zeros after them. A zero changes no range, has no error, and its code is not stored.
template <int T> inline F load_some(const char* p, int64_t count) {
    char buffer[LANES * 4] = {};
    std::memcpy(buffer, p, count * width<T>());
    return load<T>(buffer);
}

// Round to nearest even, as torch does; NaN stays NaN.
inline U float_to_bf16(F f) {
    const U u = cast<U>(f), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (u & 0x7fffffffu) > 0x7f800000u ? usplat(0x7fc0u) : rounded;
}

inline U float_to_half(F f) {
    const U u = cast<U>(f), magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
    const U normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
    const U subnormal = cast<U>(cast<F>(magnitude) + 0.5f) - 0x3f000000u;  // the last bit of 0.5 is 2^-24
    U bits = magnitude < 0x38800000u ? subnormal : normal;
    bits = bits > 0x7c00u ? usplat(0x7c00u) : bits;
    bits = magnitude > 0x7f800000u ? usplat(0x7e00u) : bits;
    return bits | sign;
}

template <int T> inline void store(char* p, F f, int64_t count = LANES) {
    if constexpr (T == FP32) {
        std::memcpy(p, &f, count * 4);
    } else {
        const H h = __builtin_convertvector(T == BF16 ? float_to_bf16(f) : float_to_half(f), H);
        std::memcpy(p, &h, count * 2);
    }
}

// Sums of squares in fp64, sixteen of them side by side, added up in order at the end.
struct Squares {
    D sums[2 * PARTS] = {};
    inline void add(F f, int64_t part) {
        HalfF half[2];
        std::memcpy(half, &f, sizeof f);
        const D a = widen(half[0]), b = widen(half[1]);
        sums[2 * part] += a * a, sums[2 * part + 1] += b * b;
    }
    double total() const {
        double lanes[STEP], sum = 0;
        std::memcpy(lanes, sums, sizeof lanes);
        for (double lane : lanes) sum += lane;
        return sum;
    }
};

// Runs work(i) for every i < count on up to `threads` threads. Which thread runs which i is left open: results must not depend on it.
template <class Work> void parallel(int64_t count, int threads, Work work) {
    std::atomic<int64_t> next{0};
    auto loop = [&] {
        for (int64_t i = next++; i < count; i = next++) work(i);
    };
    std::vector<std::thread> helpers;
    try {
        for (int64_t t = 1; t < std::min<int64_t>(threads, count); t++) helpers.emplace_back(loop);
    } catch (const std::system_error&) {
        // a container at its limit of threads: those that there are do the work
    }
    loop();
    for (auto& helper : helpers) helper.join();
}

// Fresh memory costs a page fault every 4 KiB, more than the kernels themselves; huge pages make it one every 2 MiB.
inline void prefer_huge_pages(void* p, int64_t bytes) {
#ifdef __linux__
    const uintptr_t huge = 2 << 20, first = (reinterpret_cast<uintptr_t>(p) + huge - 1) & ~(huge - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) & ~(huge - 1);
    if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

}  // namespace
