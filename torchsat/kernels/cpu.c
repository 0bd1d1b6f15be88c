/* The rows of statistics.py in one pass over memory. cpu.py compiles this file on the user's machine, if there is a C compiler.

   The elements of a vector lie `stride` apart. They are read in blocks that stay in the first-level cache: each block is converted to double once,
   and then reduced by loops that the compiler vectorises. All sums are double. An element counts only if all that is read of it is finite.

   cpu.py passes these macros, made from columns.py and formulas.py:
   COLUMNS          the columns of a row in their order, in upper case
   SUMS             how many of them are sums; the others, behind them, take the largest
   UNWEIGHED        the sum columns that an element enters as 1, whatever its call
   BINS             how many columns the histogram has, from BIN0 on
   FIRST            the exponent and first mantissa bit of the float32 at the upper edge of the first bin
   HEAD_COLUMNS     the rows of a block of heads
   UNIT_COLUMNS     the rows of a unit block

   tests/test_kernels.py compares every column with the plain implementation. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 256
#define BANKS 8
#define PARTS 64

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

enum { COLUMNS, WIDTH };
enum { HEAD_COLUMNS };
enum { UNIT_COLUMNS };

/* A vector in memory: its type is one of the four above, its elements lie `stride` apart. */
typedef struct { const void *data; int64_t kind, stride; } vector;

/* |f'|, as a formula of z or GIVEN as a vector. The formulas are those of formulas.py:
   LOGISTIC  c s(b z) s(-b z), where s is the logistic function
   BETWEEN   c where b < z < d, else 0
   SILU      |s(z) (1 + z s(-z))|
   GELU      |s(u) + z s(u) s(-u) u'|, where u = 2 sqrt(2 / pi) (z + 0.044715 z^3): the approximation by tanh */
enum { GIVEN, LOGISTIC, BETWEEN, SILU, GELU };
typedef struct { int64_t kind; double b, c, d; vector given; } derivative;

/* Which unit each element of a vector belongs to. The `read` elements are drawn from a dense tensor of `elements`, as sampling.py says, or are all of
   it; its unit axis has `size` entries that lie `inner` elements apart. */
typedef struct { int64_t elements, read, seed, inner, size; } axis;

static float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The value of a float16. */
static float half(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = (uint32_t)(bits & 0x7fff) << 13;
    if (rest >= 0x7c00u << 13)
        return from_bits(sign | 0x7f800000u | rest);
    /* The exponent is moved from bias 15 to bias 127 by a product. It is exact, and right for subnormal numbers too. */
    float magnitude = from_bits(rest) * 0x1p112f;
    return sign ? -magnitude : magnitude;
}

/* Elements `first` to `first` + `count` of a vector, as doubles. */
static void load(const vector *from, int64_t first, int count, double *to)
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

/* |f'| of the `m` elements z that begin at element `first` of the call. */
static void differentiate(const derivative *of, int64_t first, int m, const double *restrict z, double *restrict derivatives)
{
    double b = of->b, c = of->c, d = of->d;
    switch (of->kind) {
    case GIVEN:
        load(&of->given, first, m, derivatives);
        break;
    case LOGISTIC:
#pragma omp simd
        for (int i = 0; i < m; i++) {
            double e = exp_negative(-fabs(b * z[i]));
            derivatives[i] = c * e / ((1 + e) * (1 + e));
        }
        break;
    case BETWEEN:
#pragma omp simd
        for (int i = 0; i < m; i++) derivatives[i] = (z[i] > b ? c : 0) * (z[i] < d ? 1.0 : 0.0);
        break;
    case SILU:
#pragma omp simd
        for (int i = 0; i < m; i++) {
            double v = z[i], e = exp_negative(-fabs(v)), whole = 1 / (1 + e), up = v > 0 ? whole : e * whole;
            derivatives[i] = fabs(up * (1 + v * (1 - up)));
        }
        break;
    case GELU:
#pragma omp simd
        for (int i = 0; i < m; i++) {
            /* Beyond |z| = 30 the second term is 0. */
            double v = z[i] > 30 ? 30 : z[i] < -30 ? -30 : z[i];
            double u = 1.5957691216057308 * (v + 0.044715 * v * v * v), e = exp_negative(-fabs(u)), whole = 1 / (1 + e);
            double up = u > 0 ? whole : e * whole;
            derivatives[i] = fabs(up + v * e * whole * whole * 1.5957691216057308 * (1 + 0.134145 * v * v));
        }
    }
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
static void draw(double elements, double read, uint32_t seed, uint32_t row, int64_t first, int m, double *restrict to)
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

/* Write rows * count places in a vector of `size`, as sampling.py describes them. `wide` says whether they are 64 bits wide. */
void torchsat_places(int64_t size, int64_t count, int64_t seed, int64_t rows, int64_t wide, void *out)
{
    double place[BLOCK];
    for (int64_t row = 0; row < rows; row++)
        for (int64_t first = 0; first < count; first += BLOCK) {
            int m = count - first < BLOCK ? (int)(count - first) : BLOCK;
            draw((double)size, (double)count, (uint32_t)seed, (uint32_t)row, first, m, place);
            if (wide)
                for (int i = 0; i < m; i++) ((int64_t *)out)[row * count + first + i] = (int64_t)place[i];
            else
                for (int i = 0; i < m; i++) ((int32_t *)out)[row * count + first + i] = (int32_t)place[i];
        }
}

/* The units of elements `first` to `first` + `m` of a vector. */
static void find_units(const axis *of, int64_t first, int m, int32_t *units)
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

/* What a forward call is measured with. An edge of a tail, and the peak, are NaN where there is none. */
typedef struct {
    const vector *z, *a;
    const derivative *of;
    double low, high, peak;
    int64_t sigmoid;
} call;

/* The row of no element. */
static void clear(double *row)
{
    for (int i = 0; i < WIDTH; i++) row[i] = i < SUMS ? 0.0 : -INFINITY;
}

/* Merge a row of elements that were read into another row, each element with this weight. */
static void merge(double *into, const double *row, double weight)
{
    static const int unweighed[] = { UNWEIGHED };
    double weights[SUMS];
    for (int i = 0; i < SUMS; i++) weights[i] = weight;
    for (size_t i = 0; i < sizeof unweighed / sizeof *unweighed; i++) weights[unweighed[i]] = 1;
    for (int i = 0; i < SUMS; i++) into[i] += weights[i] * row[i];
    for (int i = SUMS; i < WIDTH; i++) into[i] = row[i] > into[i] ? row[i] : into[i];
}

/* The row of elements `begin_at` to `end_at` of a forward call, each with the weight 1, without the column ELEMENTS. Unless block [3, size] is NULL, the
   samples and the saturated samples of each unit are added to it, weighed, and the samples once more, unweighed. */
static void observe(const call *in, int64_t begin_at, int64_t end_at, double weight, double *row, const axis *units, double *block)
{
    double z[BLOCK], a[BLOCK], slope[BLOCK], ok[BLOCK], saturated[BLOCK];
    int32_t bin[BLOCK], unit_of[BLOCK];
    int64_t counted[BANKS][BINS];
    double n = 0, lows = 0, highs = 0, s1 = 0, s2 = 0, z1 = 0, z2 = 0, a1 = 0, a2 = 0, nonzero = 0, left = 0, right = 0;
    double z_max = -INFINITY, z_min = INFINITY, a_max = -INFINITY, a_min = INFINITY;
    double low = in->low == in->low ? in->low : -INFINITY, high = in->high == in->high ? in->high : INFINITY, per_peak = 1 / in->peak;
    int measured = in->peak == in->peak;
    memset(counted, 0, sizeof counted);
    for (int64_t first = begin_at; first < end_at; first += BLOCK) {
        int m = end_at - first < BLOCK ? (int)(end_at - first) : BLOCK;
        load(in->z, first, m, z);
        load(in->a, first, m, a);
        differentiate(in->of, first, m, z, slope);
#pragma omp simd reduction(+ : n)
        for (int i = 0; i < m; i++) {
            double good = z[i] * 0 + a[i] * 0 + slope[i] * 0 == 0 ? 1.0 : 0.0;
            ok[i] = good;
            n += good;
        }
#pragma omp simd
        for (int i = 0; i < m; i++) {
            z[i] = ok[i] != 0 ? z[i] : 0.0;
            a[i] = ok[i] != 0 ? a[i] : 0.0;
            slope[i] = ok[i] != 0 ? slope[i] : 0.0;
        }
#pragma omp simd reduction(+ : lows, highs, z1, z2) reduction(max : z_max) reduction(min : z_min)
        for (int i = 0; i < m; i++) {
            double v = z[i], is_low = v <= low ? ok[i] : 0.0, is_high = v >= high ? ok[i] : 0.0;
            double top = ok[i] != 0 ? v : -INFINITY, bottom = ok[i] != 0 ? v : INFINITY;
            saturated[i] = is_low + is_high;
            lows += is_low;
            highs += is_high;
            z1 += v;
            z2 += v * v;
            z_max = top > z_max ? top : z_max;
            z_min = bottom < z_min ? bottom : z_min;
        }
#pragma omp simd reduction(+ : a1, a2, nonzero, left, right) reduction(max : a_max) reduction(min : a_min)
        for (int i = 0; i < m; i++) {
            double v = a[i], top = ok[i] != 0 ? v : -INFINITY, bottom = ok[i] != 0 ? v : INFINITY;
            a1 += v;
            a2 += v * v;
            nonzero += v != 0 ? 1.0 : 0.0;
            left += v < 0.1 ? ok[i] : 0.0;
            right += v > 0.9 ? ok[i] : 0.0;
            a_max = top > a_max ? top : a_max;
            a_min = bottom < a_min ? bottom : a_min;
        }
#pragma omp simd reduction(+ : s1, s2)
        for (int i = 0; i < m; i++) {
            s1 += slope[i];
            s2 += slope[i] * slope[i];
        }
        if (measured) {
#pragma omp simd
            for (int i = 0; i < m; i++) {
                float relative = (float)(slope[i] * per_peak);
                int32_t bits, index;
                memcpy(&bits, &relative, sizeof bits);
                index = (bits >> 22) - FIRST;
                index = index < 0 ? 0 : index;
                bin[i] = index > BINS - 1 ? BINS - 1 : index;
            }
            /* Neighbours often fall into the same bin, and an addition would wait for the one before: hence several tables. */
            for (int i = 0; i < m; i++) counted[i % BANKS][bin[i]] += ok[i] != 0;
        }
        if (block) {
            find_units(units, first, m, unit_of);
            for (int i = 0; i < m; i++) {
                double *samples = block + unit_of[i];
                samples[SAMPLES * units->size] += weight * ok[i];
                samples[SATURATED * units->size] += weight * saturated[i];
                samples[SAMPLES_READ * units->size] += ok[i];
            }
        }
    }
    clear(row);
    row[N] = n;
    row[READ] = n;
    row[NONFINITE] = (double)(end_at - begin_at) - n;
    row[LOW] = lows;
    row[HIGH] = highs;
    row[DERIVATIVE] = s1;
    row[DERIVATIVE_SQ] = s2;
    row[Z] = z1;
    row[Z_SQ] = z2;
    row[A] = a1;
    row[A_SQ] = a2;
    row[ZEROS] = n - nonzero;
    row[GATE_LEFT] = in->sigmoid ? left : 0;
    row[GATE_RIGHT] = in->sigmoid ? right : 0;
    for (int i = 0; i < BINS; i++) {
        int64_t sum = 0;
        for (int bank = 0; bank < BANKS; bank++) sum += counted[bank][i];
        row[BIN0 + i] = (double)sum;
    }
    row[PEAK] = measured ? in->peak : -INFINITY;
    row[Z_MAX] = z_max;
    row[Z_MIN_NEGATED] = -z_min;
    row[A_MAX] = a_max;
    row[A_MIN_NEGATED] = -a_min;
}

/* What `extremes` finds: how many elements are inf or nan, the largest z, minus the smallest z, the same of a. */
enum { BAD, Z_TOP, Z_BOTTOM_NEGATED, A_TOP, A_BOTTOM_NEGATED, FOUND };

/* Merge `m` neighbouring elements z and a, of type REAL, into what was found before. */
#define SCAN(name, REAL)                                                                                                                              \
    static void name(const REAL *restrict z, const REAL *restrict a, int m, double *found)                                                            \
    {                                                                                                                                                 \
        REAL z_top = -INFINITY, z_low = -INFINITY, a_top = -INFINITY, a_low = -INFINITY;                                                              \
        int bad = 0;                                                                                                                                  \
        _Pragma("omp simd reduction(+ : bad) reduction(max : z_top, z_low, a_top, a_low)") for (int i = 0; i < m; i++)                                \
        {                                                                                                                                             \
            int good = z[i] * 0 + a[i] * 0 == 0;                                                                                                      \
            REAL v = good ? z[i] : (REAL)-INFINITY, v_low = good ? -z[i] : (REAL)-INFINITY;                                                           \
            REAL u = good ? a[i] : (REAL)-INFINITY, u_low = good ? -a[i] : (REAL)-INFINITY;                                                           \
            bad += !good;                                                                                                                             \
            z_top = v > z_top ? v : z_top;                                                                                                            \
            z_low = v_low > z_low ? v_low : z_low;                                                                                                    \
            a_top = u > a_top ? u : a_top;                                                                                                            \
            a_low = u_low > a_low ? u_low : a_low;                                                                                                    \
        }                                                                                                                                             \
        found[BAD] += bad;                                                                                                                            \
        found[Z_TOP] = z_top > found[Z_TOP] ? z_top : found[Z_TOP];                                                                                   \
        found[Z_BOTTOM_NEGATED] = z_low > found[Z_BOTTOM_NEGATED] ? z_low : found[Z_BOTTOM_NEGATED];                                                  \
        found[A_TOP] = a_top > found[A_TOP] ? a_top : found[A_TOP];                                                                                   \
        found[A_BOTTOM_NEGATED] = a_low > found[A_BOTTOM_NEGATED] ? a_low : found[A_BOTTOM_NEGATED];                                                  \
    }
SCAN(scan_floats, float)
SCAN(scan_doubles, double)

/* Elements `first` to `first` + `m` of a vector that is not float64, as floats; where that needs no copy, the elements themselves. */
static const float *as_floats(const vector *from, int64_t first, int m, float *to)
{
    const uint16_t *data = (const uint16_t *)from->data + first * from->stride;
    if (from->kind == FLOAT32 && from->stride == 1) return (const float *)from->data + first;
    if (from->kind == FLOAT32)
        for (int i = 0; i < m; i++) to[i] = ((const float *)from->data)[(first + i) * from->stride];
    else if (from->kind == BFLOAT16)
        for (int i = 0; i < m; i++) to[i] = from_bits((uint32_t)data[i * from->stride] << 16);
    else
        for (int i = 0; i < m; i++) to[i] = half(data[i * from->stride]);
    return to;
}

static int64_t width_of(const vector *of)
{
    return of->kind == FLOAT64 ? 8 : of->kind == FLOAT32 ? 4 : 2;
}

/* The extremes of `count` elements z and a, and how many are inf or nan, in found[FOUND]. They lie in rows of `columns` elements, which are `z_row` and
   `a_row` elements apart in memory; the last row may be shorter. */
void torchsat_extremes(const vector *z_in, const vector *a_in, int64_t count, int64_t columns, int64_t z_row, int64_t a_row, int64_t parts,
                       double *found)
{
    double each[PARTS][FOUND];
    int64_t rows = (count + columns - 1) / columns;
    if (parts > PARTS) parts = PARTS;
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) if (parts > 1)
#endif
    for (int64_t part = 0; part < parts; part++) {
        double *mine = each[part];
        mine[BAD] = 0;
        for (int i = 1; i < FOUND; i++) mine[i] = -INFINITY;
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
            vector z = { (const char *)z_in->data + row * z_row * width_of(z_in), z_in->kind, z_in->stride };
            vector a = { (const char *)a_in->data + row * a_row * width_of(a_in), a_in->kind, a_in->stride };
            int64_t length = count - row * columns < columns ? count - row * columns : columns;
            for (int64_t first = 0; first < length; first += BLOCK) {
                int m = length - first < BLOCK ? (int)(length - first) : BLOCK;
                if (z.kind == FLOAT64 || a.kind == FLOAT64) {
                    double z_block[BLOCK], a_block[BLOCK];
                    load(&z, first, m, z_block);
                    load(&a, first, m, a_block);
                    scan_doubles(z_block, a_block, m, mine);
                } else {
                    float z_block[BLOCK], a_block[BLOCK];
                    scan_floats(as_floats(&z, first, m, z_block), as_floats(&a, first, m, a_block), m, mine);
                }
            }
        }
    }
    found[BAD] = 0;
    for (int i = 1; i < FOUND; i++) found[i] = -INFINITY;
    for (int64_t part = 0; part < parts; part++) {
        found[BAD] += each[part][BAD];
        for (int i = 1; i < FOUND; i++) found[i] = each[part][i] > found[i] ? each[part][i] : found[i];
    }
}

/* Merge one forward call into a row, and add the samples of each unit to block [3, size], unless it is NULL. `count` of its `elements` were read.
   low, high, peak: NaN where there is none. The elements are divided among `parts` threads. exact: what torchsat_extremes has found among all elements
   of the call, if only some were read; otherwise NULL. */
void torchsat_observe(const vector *z, const vector *a, const derivative *of, int64_t count, double elements, double low, double high,
                      double peak, int64_t sigmoid, int64_t parts, const double *exact, double *row, const axis *units, double *block)
{
    call in = { z, a, of, low, high, peak, sigmoid };
    double rows[PARTS][WIDTH], *others = 0, weight = count ? elements / (double)count : 1;
    int64_t size = block ? 3 * units->size : 0;
    if (parts > PARTS) parts = PARTS;
    if (block && parts > 1) others = calloc((size_t)(size * (parts - 1)), sizeof *others);
    if (block && !others) parts = 1;
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) if (parts > 1)
#endif
    for (int64_t part = 0; part < parts; part++)
        observe(&in, count * part / parts, count * (part + 1) / parts, weight, rows[part], units, part ? others ? others + (part - 1) * size : 0 : block);
    for (int64_t part = 0; part < parts; part++) {
        if (exact) rows[part][NONFINITE] = 0;
        merge(row, rows[part], weight);
    }
    if (exact) {
        static const int at[] = { NONFINITE, Z_MAX, Z_MIN_NEGATED, A_MAX, A_MIN_NEGATED };
        row[NONFINITE] += exact[BAD];
        for (int i = 1; i < FOUND; i++) row[at[i]] = exact[i] > row[at[i]] ? exact[i] : row[at[i]];
    }
    for (int64_t part = 1; others && part < parts; part++)
        for (int64_t i = 0; i < size; i++) block[i] += others[(part - 1) * size + i];
    free(others);
    row[ELEMENTS] += elements;
}

/* The row and the block of heads of a softmax, as observe_softmax in statistics.py describes them. Both are empty when they are passed.
   z: [batch, heads, queries, keys], with these sizes and strides, which were read of `elements` logits. visible: bytes, with strides of their own (0 where they are broadcast). */
void torchsat_softmax(const vector *z_in, const uint8_t *visible, const int64_t *sizes, const int64_t *z_strides, const int64_t *visible_strides,
                      double elements, double *row, double *heads)
{
    int64_t size = sizes[1], keys = sizes[3];
    double z[BLOCK], seen[BLOCK];
    int64_t width = width_of(z_in);
    double all = (double)(sizes[0] * sizes[1] * sizes[2] * keys), weight = all > 0 ? elements / all : 1;
    row[ELEMENTS] = elements;
    for (int64_t query = 0; query < sizes[0] * sizes[1] * sizes[2]; query++) {
        int64_t at[3] = { query / (sizes[1] * sizes[2]), query / sizes[2] % sizes[1], query % sizes[2] };
        int64_t z_at = at[0] * z_strides[0] + at[1] * z_strides[1] + at[2] * z_strides[2];
        const uint8_t *see = visible + at[0] * visible_strides[0] + at[1] * visible_strides[1] + at[2] * visible_strides[2];
        vector here = { (const char *)z_in->data + z_at * width, z_in->kind, z_strides[3] };
        double n = 0, bad = 0, top = -INFINITY, bottom = INFINITY, sum = 0, square = 0;
        double total = 0, weighted = 0, total_square = 0, nonzero = 0, least = INFINITY, deviation = 0, mean, log_total, log_keys;
        for (int64_t first = 0; first < keys; first += BLOCK) {
            int m = keys - first < BLOCK ? (int)(keys - first) : BLOCK;
            load(&here, first, m, z);
            for (int i = 0; i < m; i++) seen[i] = see[(first + i) * visible_strides[3]] ? 1.0 : 0.0;
#pragma omp simd reduction(+ : n, bad, sum, square) reduction(max : top) reduction(min : bottom)
            for (int i = 0; i < m; i++) {
                double good = z[i] * 0 == 0 ? seen[i] : 0.0, v = good != 0 ? z[i] : 0.0;
                double high = good != 0 ? v : -INFINITY, low = good != 0 ? v : INFINITY;
                n += seen[i];
                bad += seen[i] - good;
                sum += v;
                square += v * v;
                top = high > top ? high : top;
                bottom = low < bottom ? low : bottom;
            }
        }
        if (bad > 0) row[NONFINITE] += n;
        if (bad > 0 || n < 2) continue;
        mean = sum / n;
        for (int64_t first = 0; first < keys; first += BLOCK) {
            int m = keys - first < BLOCK ? (int)(keys - first) : BLOCK;
            load(&here, first, m, z);
            for (int i = 0; i < m; i++) seen[i] = see[(first + i) * visible_strides[3]] ? 1.0 : 0.0;
#pragma omp simd reduction(+ : total, weighted, total_square, nonzero, deviation) reduction(min : least)
            for (int i = 0; i < m; i++) {
                double shifted = seen[i] != 0 ? z[i] - top : 0, off = seen[i] != 0 ? z[i] - mean : 0;
                /* e^-745 is the smallest number above 0 in float64. */
                double e = shifted < -745 ? 0 : exp_negative(shifted) * seen[i], low = seen[i] != 0 ? e : INFINITY;
                total += e;
                weighted += e * shifted;
                total_square += e * e;
                nonzero += e > 0 ? 1.0 : 0.0;
                deviation += off * off;
                least = low < least ? low : least;
            }
        }
        log_total = log(total);
        log_keys = log(n);
        heads[ROWS * size + at[1]] += weight;
        heads[ROWS_READ * size + at[1]] += 1;
        heads[ENTROPY * size + at[1]] += weight * ((log_total - weighted / total) / log_keys);
        heads[JACOBIAN * size + at[1]] += weight * (1 - total_square / (total * total));
        heads[LOGIT_VARIANCE * size + at[1]] += weight * (deviation / n);
        heads[LOG_KEYS * size + at[1]] += weight * log_keys;
        if (top > heads[LOGIT_MAX * size + at[1]]) heads[LOGIT_MAX * size + at[1]] = top;
        row[N] += weight * n;
        row[READ] += n;
        row[Z] += weight * sum;
        row[Z_SQ] += weight * square;
        row[A] += weight;
        row[A_SQ] += weight * (total_square / (total * total));
        row[ZEROS] += weight * (n - nonzero);
        if (top > row[Z_MAX]) row[Z_MAX] = top;
        if (-bottom > row[Z_MIN_NEGATED]) row[Z_MIN_NEGATED] = -bottom;
        if (1 / total > row[A_MAX]) row[A_MAX] = 1 / total;
        if (-least / total > row[A_MIN_NEGATED]) row[A_MIN_NEGATED] = -least / total;
    }
}

/* Merge one backward call into a row. The data of a vector are NULL where that gradient is not known. `count` of its `elements` were read. */
void torchsat_gradient(const vector *grad_a, const vector *grad_z, int64_t count, double elements, double *row)
{
    double weight = count ? elements / (double)count : 1;
    double a[BLOCK] = { 0 }, z[BLOCK] = { 0 };
    double n = 0, a2 = 0, z2 = 0;
    for (int64_t first = 0; first < count; first += BLOCK) {
        int m = count - first < BLOCK ? (int)(count - first) : BLOCK;
        if (grad_a->data) load(grad_a, first, m, a);
        if (grad_z->data) load(grad_z, first, m, z);
#pragma omp simd reduction(+ : n, a2, z2)
        for (int i = 0; i < m; i++) {
            double good = a[i] * 0 + z[i] * 0 == 0 ? 1.0 : 0.0;
            double u = good != 0 ? a[i] : 0.0, v = good != 0 ? z[i] : 0.0;
            n += good;
            a2 += u * u;
            z2 += v * v;
        }
    }
    row[GRAD_A_N] += grad_a->data ? weight * n : 0;
    row[GRAD_A_READ] += grad_a->data ? n : 0;
    row[GRAD_A_SQ] += weight * a2;
    row[GRAD_Z_N] += grad_z->data ? weight * n : 0;
    row[GRAD_Z_READ] += grad_z->data ? n : 0;
    row[GRAD_Z_SQ] += weight * z2;
    row[GRAD_NONFINITE] += (double)count - n;
}

/* Add the samples, the sum of x and the sum of x^2 of each unit to sums [3, size], each sample with the weight 1. */
void torchsat_features(const vector *x_in, int64_t count, const axis *units, double *sums)
{
    double x[BLOCK];
    int32_t unit_of[BLOCK];
    double *samples = sums, *first_power = sums + units->size, *second_power = sums + 2 * units->size;
    for (int64_t first = 0; first < count; first += BLOCK) {
        int m = count - first < BLOCK ? (int)(count - first) : BLOCK;
        load(x_in, first, m, x);
        find_units(units, first, m, unit_of);
        for (int i = 0; i < m; i++) {
            int32_t unit = unit_of[i];
            double good = x[i] * 0 == 0 ? 1.0 : 0.0, v = good != 0 ? x[i] : 0.0;
            samples[unit] += good;
            first_power[unit] += v;
            second_power[unit] += v * v;
        }
    }
}

/* Write the sum of squares of a vector to out[0] and, if `other` has data, the sum of squares of their difference to out[1]. */
void torchsat_squares(const vector *x_in, const vector *other, int64_t count, double *out)
{
    double total = 0, change = 0;
#ifdef _OPENMP
#pragma omp parallel for reduction(+ : total, change) if (count > (1 << 17))
#endif
    for (int64_t first = 0; first < count; first += BLOCK) {
        double x[BLOCK], y[BLOCK], sum = 0, difference = 0;
        int m = count - first < BLOCK ? (int)(count - first) : BLOCK;
        load(x_in, first, m, x);
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < m; i++) sum += x[i] * x[i];
        if (other->data) {
            load(other, first, m, y);
#pragma omp simd reduction(+ : difference)
            for (int i = 0; i < m; i++) difference += (y[i] - x[i]) * (y[i] - x[i]);
        }
        total += sum;
        change += difference;
    }
    out[0] = total;
    if (other->data) out[1] = change;
}
