/* What the kernels share: vectors in memory, which of their elements are read, and to which unit each of these belongs.

   cpu.py passes these macros, made from columns.py and formulas.py:
   COLUMNS          the columns of a row in their order, in upper case
   SUMS             how many of them are sums; the others, behind them, take the largest
   UNWEIGHED        the sum columns that an element enters as 1, whatever its call
   BINS             how many columns the histogram has, from BIN0 on
   FIRST            the exponent and first mantissa bit of the float32 at the upper edge of the first bin
   HEAD_COLUMNS     the rows of a block of heads
   UNIT_COLUMNS     the rows of a unit block */

#ifndef TORCHSAT_VECTORS
#define TORCHSAT_VECTORS

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 256
#define PARTS 64

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

enum { COLUMNS, WIDTH };
enum { HEAD_COLUMNS };
enum { UNIT_COLUMNS };

/* What `torchsat_extremes` finds: how many elements are inf or nan, the largest z, minus the smallest z, the same of a. */
enum { BAD, Z_TOP, Z_BOTTOM_NEGATED, A_TOP, A_BOTTOM_NEGATED, FOUND };

/* A vector in memory: its type is one of the four above, its elements lie `stride` apart. */
typedef struct { const void *data; int64_t kind, stride; } vector;

/* Which unit each element of a vector belongs to. The `read` elements are drawn from a dense tensor of `elements`, as sampling.py says, or are all of
   it; its unit axis has `size` entries that lie `inner` elements apart. table: the units, if they are known already; otherwise NULL. */
typedef struct { int64_t elements, read, seed, inner, size; const int32_t *table; } axis;

static inline float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The value of a float16. */
static inline float half(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = (uint32_t)(bits & 0x7fff) << 13;
    if (rest >= 0x7c00u << 13)
        return from_bits(sign | 0x7f800000u | rest);
    /* The exponent is moved from bias 15 to bias 127 by a product. It is exact, and right for subnormal numbers too. */
    float magnitude = from_bits(rest) * 0x1p112f;
    return sign ? -magnitude : magnitude;
}

/* Elements `first` to `first` + `count` of a vector, as doubles. */
static inline void load(const vector *from, int64_t first, int count, double *to)
{
    int64_t stride = from->stride;
    if (from->kind == FLOAT32) {
        const float *data = (const float *)from->data + first * stride;
        for (int i = 0; i < count; i++) to[i] = data[i * stride];
    } else if (from->kind == FLOAT64) {
        const double *data = (const double *)from->data + first * stride;
        for (int i = 0; i < count; i++) to[i] = data[i * stride];
    } else if (from->kind == BFLOAT16) {
        const uint16_t *data = (const uint16_t *)from->data + first * stride;
        for (int i = 0; i < count; i++) to[i] = from_bits((uint32_t)data[i * stride] << 16);
    } else {
        const uint16_t *data = (const uint16_t *)from->data + first * stride;
        for (int i = 0; i < count; i++) to[i] = half(data[i * stride]);
    }
}

static inline int64_t width_of(const vector *of)
{
    return of->kind == FLOAT64 ? 8 : of->kind == FLOAT32 ? 4 : 2;
}

/* e^x for x <= 0. x is split into k ln 2 + r with |r| <= ln 2 / 2; e^r is its series up to r^11 (the next term is below 1e-14), and k is added to the
   exponent. For x below -700 it returns e^-700, which is too small to change any sum in float64. */
static inline double exp_negative(double x)
{
    x = x > -700 ? x : -700;
    /* The last bits of 1.5 * 2^52 + k, as a double, are the integer k. */
    double shifted = x * 1.4426950408889634 + 0x1.8p52, k = shifted - 0x1.8p52;
    double r = (x - k * 0x1.62e42fefa39efp-1) - k * 0x1.abc9e3b39803fp-56, sum;
    int64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    sum = 1 + r * (1 + r * (1.0 / 2 + r * (1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120 + r * (1.0 / 720 + r * (1.0 / 5040 + r * (1.0 / 40320 +
          r * (1.0 / 362880 + r * (1.0 / 3628800 + r * (1.0 / 39916800)))))))))));
    bits = (int64_t)((uint64_t)bits << 52);
    {
        int64_t value;
        memcpy(&value, &sum, sizeof value);
        value += bits;
        memcpy(&sum, &value, sizeof sum);
    }
    return sum;
}

/* The same in float32, to its last bit or two; x below -87 gives e^-87. */
static inline float exp_negative_float(float x)
{
    x = x > -87 ? x : -87;
    float shifted = x * 1.44269504f + 0x1.8p23f, k = shifted - 0x1.8p23f;
    float r = (x - k * 0x1.62e4p-1f) - k * 0x1.7f7d1cp-20f;
    float sum = 1 + r * (1 + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040)))))));
    uint32_t bits, value;
    memcpy(&bits, &shifted, sizeof bits);
    memcpy(&value, &sum, sizeof value);
    return from_bits(value + (bits << 23));
}

/* The hash of sampling.py. */
static inline uint32_t mixed(uint32_t x)
{
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

/* Places `first` to `first` + `m` of the `read` ones that are drawn from `elements`, in the n-th row of such draws, as whole numbers. */
static inline void draw(double elements, double read, uint32_t seed, uint32_t row, int64_t first, int m, double *restrict to)
{
    double length = elements / read, last = elements - 1, begin = (double)first;
    seed += row * (uint32_t)read + (uint32_t)first;
#pragma omp simd
    for (int i = 0; i < m; i++) {
        double drawn = (double)(int32_t)(mixed(seed + (uint32_t)i) >> 8) * 0x1p-24;
        double place = floor((drawn + (begin + (double)i)) * length);
        to[i] = place < last ? place : last;
    }
}

/* The units of elements `first` to `first` + `m` of a vector. */
static inline void find_units(const axis *of, int64_t first, int m, int32_t *units)
{
    if (of->read == of->elements) {
        int64_t rest = first % of->inner, unit = first / of->inner % of->size;
        for (int i = 0; i < m; i++) {
            units[i] = (int32_t)unit;
            if (++rest == of->inner) {
                rest = 0;
                if (++unit == of->size) unit = 0;
            }
        }
        return;
    }
    /* Quotients of integers below 2^53 are rounded down rightly, since none of them lies closer below an integer than float64 can tell. */
    double inner = (double)of->inner, size = (double)of->size, place[BLOCK];
    draw((double)of->elements, (double)of->read, (uint32_t)of->seed, 0, first, m, place);
#pragma omp simd
    for (int i = 0; i < m; i++) {
        double outer = floor(place[i] / inner);
        units[i] = (int32_t)(outer - size * floor(outer / size));
    }
}

/* What no element has. */
static inline void nothing_found(double *found)
{
    found[BAD] = 0;
    for (int i = 1; i < FOUND; i++) found[i] = -INFINITY;
}

/* Merge what several threads have found. */
static inline void merge_found(double each[][FOUND], int64_t parts, double *found)
{
    nothing_found(found);
    for (int64_t part = 0; part < parts; part++) {
        found[BAD] += each[part][BAD];
        for (int i = 1; i < FOUND; i++) found[i] = each[part][i] > found[i] ? each[part][i] : found[i];
    }
}

#endif
