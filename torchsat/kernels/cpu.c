/* The rows of statistics.py in one pass over memory; compiled on the user's machine, where there is a C compiler (cpu.py).

   Elements are taken `stride` apart and read in blocks that stay in the first-level cache: converted to double once, then reduced by loops
   that the compiler vectorises. All sums are double. An element counts only if all that is read of it is finite.

   BINS, FIRST (the first histogram bin, counted in half octaves of float32) and the order of the columns are those of statistics.py;
   tests/test_kernels.py compares every column with the plain implementation there. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 256
#define BANKS 8
#define PARTS 64

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

enum { N, ELEMENTS, NONFINITE, LOW, HIGH, SLOPE, SLOPE_SQ, Z, Z_SQ, A, A_SQ, ZEROS, GATE_LEFT, GATE_RIGHT,
       GRAD_A_N, GRAD_A_SQ, GRAD_Z_N, GRAD_Z_SQ, GRAD_NONFINITE, HISTOGRAM,
       PEAK = HISTOGRAM + BINS, Z_MAX, Z_MIN_NEGATED, A_MAX, A_MIN_NEGATED, WIDTH };

/* A vector in memory: one of the four kinds, its elements `stride` apart. */
typedef struct { const void *data; int64_t kind, stride; } vector;

/* |f'| as a formula of z, or GIVEN as a vector:
   LOGISTIC  c s(b z) s(-b z) with s the logistic function
   BETWEEN   c where b < z < d, else 0
   SILU      s(z) (1 + z s(-z))
   GELU      of the approximation by tanh: s(u) + z s(u) s(-u) u', with u = 2 sqrt(2 / pi) (z + 0.044715 z^3) */
enum { GIVEN, LOGISTIC, BETWEEN, SILU, GELU };
typedef struct { int64_t kind; double b, c, d; vector given; } derivative;

/* Which unit each element belongs to: the one at `start` + i * `step` of a dense tensor whose unit axis has `size` entries, `inner` elements
   apart. */
typedef struct { int64_t start, step, inner, size; } axis;

static float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float half(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = (uint32_t)(bits & 0x7fff) << 13;
    if (rest >= 0x7c00u << 13)
        return from_bits(sign | 0x7f800000u | rest);
    /* The exponent moves from bias 15 to 127 by a product, which is exact and sets subnormal numbers right as well. */
    float magnitude = from_bits(rest) * 0x1p112f;
    return sign ? -magnitude : magnitude;
}

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

/* e^x for x <= 0: x = k ln 2 + r with |r| <= ln 2 / 2, the series of e^r to r^11 (the next term is below 1e-14), and k added to the exponent.
   Below -700 it is e^-700, which no sum of float64 can see. */
static inline double exp_negative(double x)
{
    x = x > -700 ? x : -700;
    /* 1.5 * 2^52 as a double ends in the integer that was added to it. */
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

static void differentiate(const derivative *of, int64_t first, int m, const double *restrict z, double *restrict slope)
{
    double b = of->b, c = of->c, d = of->d;
    switch (of->kind) {
    case GIVEN:
        load(&of->given, first, m, slope);
        break;
    case LOGISTIC:
#pragma omp simd
        for (int i = 0; i < m; i++) {
            double e = exp_negative(-fabs(b * z[i]));
            slope[i] = c * e / ((1 + e) * (1 + e));
        }
        break;
    case BETWEEN:
#pragma omp simd
        for (int i = 0; i < m; i++) slope[i] = (z[i] > b ? c : 0) * (z[i] < d ? 1.0 : 0.0);
        break;
    case SILU:
#pragma omp simd
        for (int i = 0; i < m; i++) {
            double v = z[i], e = exp_negative(-fabs(v)), whole = 1 / (1 + e), up = v > 0 ? whole : e * whole;
            slope[i] = fabs(up * (1 + v * (1 - up)));
        }
        break;
    case GELU:
#pragma omp simd
        for (int i = 0; i < m; i++) {
            /* Beyond 30 the second term is 0. */
            double v = z[i] > 30 ? 30 : z[i] < -30 ? -30 : z[i];
            double u = 1.5957691216057308 * (v + 0.044715 * v * v * v), e = exp_negative(-fabs(u)), whole = 1 / (1 + e);
            double up = u > 0 ? whole : e * whole;
            slope[i] = fabs(up + v * e * whole * whole * 1.5957691216057308 * (1 + 0.134145 * v * v));
        }
    }
}

/* Units of successive elements, without a division for each. */
typedef struct { int64_t unit, rest, unit_step, rest_step, inner, size; } walk;

static walk begin(const axis *of)
{
    walk at = { of->start / of->inner % of->size, of->start % of->inner, of->step / of->inner % of->size, of->step % of->inner,
                of->inner, of->size };
    return at;
}

static int64_t next(walk *at)
{
    int64_t unit = at->unit;
    at->rest += at->rest_step;
    at->unit += at->unit_step;
    if (at->rest >= at->inner) {
        at->rest -= at->inner;
        at->unit++;
    }
    if (at->unit >= at->size) at->unit -= at->size;
    return unit;
}

typedef struct {
    const vector *z, *a;
    const derivative *of;
    double low, high, peak;
} call;

/* The columns of a forward pass over some of the elements, and their samples and saturated samples by unit, added to block [2, size]. */
static void observe(const call *in, int64_t begin_at, int64_t end_at, double *row, const axis *units, double *block)
{
    double z[BLOCK], a[BLOCK], slope[BLOCK], ok[BLOCK], out[BLOCK];
    int32_t bin[BLOCK];
    int64_t counted[BANKS][BINS];
    double n = 0, lows = 0, highs = 0, s1 = 0, s2 = 0, z1 = 0, z2 = 0, a1 = 0, a2 = 0, nonzero = 0, left = 0, right = 0;
    double z_max = -INFINITY, z_min = INFINITY, a_max = -INFINITY, a_min = INFINITY;
    double low = in->low == in->low ? in->low : -INFINITY, high = in->high == in->high ? in->high : INFINITY, per_peak = 1 / in->peak;
    int measured = in->peak == in->peak;
    walk at = { 0 };
    memset(counted, 0, sizeof counted);
    if (block) {
        axis here = *units;
        here.start += begin_at * here.step;
        at = begin(&here);
    }
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
            out[i] = is_low + is_high;
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
            /* Several tables, since neighbours often fall into one bin and would wait for each other. */
            for (int i = 0; i < m; i++) counted[i % BANKS][bin[i]] += ok[i] != 0;
        }
        if (block)
            for (int i = 0; i < m; i++) {
                int64_t unit = next(&at);
                block[unit] += ok[i];
                block[at.size + unit] += out[i];
            }
    }
    row[N] = n;
    row[NONFINITE] = (double)(end_at - begin_at) - n;
    row[LOW] = lows;
    row[HIGH] = highs;
    row[SLOPE] = s1;
    row[SLOPE_SQ] = s2;
    row[Z] = z1;
    row[Z_SQ] = z2;
    row[A] = a1;
    row[A_SQ] = a2;
    row[ZEROS] = n - nonzero;
    row[GATE_LEFT] = left;
    row[GATE_RIGHT] = right;
    for (int i = 0; i < BINS; i++) {
        int64_t sum = 0;
        for (int bank = 0; bank < BANKS; bank++) sum += counted[bank][i];
        row[HISTOGRAM + i] = (double)sum;
    }
    row[PEAK] = measured ? in->peak : -INFINITY;
    row[Z_MAX] = z_max;
    row[Z_MIN_NEGATED] = -z_min;
    row[A_MAX] = a_max;
    row[A_MIN_NEGATED] = -a_min;
}

/* Merge the columns of one forward call into a row. low, high, peak: NaN where there is none. The elements are shared out to `parts` threads.
   block: samples and saturated samples of each unit are added to it, unless it is NULL. */
void torchsat_observe(const vector *z, const vector *a, const derivative *of, int64_t count, double elements, double low, double high,
                      double peak, int64_t sigmoid, int64_t parts, double *row, const axis *units, double *block)
{
    call in = { z, a, of, low, high, peak };
    double rows[PARTS][WIDTH], *others = 0;
    int64_t size = block ? 2 * units->size : 0;
    if (parts > PARTS) parts = PARTS;
    if (block && parts > 1) others = calloc((size_t)(size * (parts - 1)), sizeof *others);
    if (block && !others) parts = 1;
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) if (parts > 1)
#endif
    for (int64_t part = 0; part < parts; part++)
        observe(&in, count * part / parts, count * (part + 1) / parts, rows[part], units, part ? others ? others + (part - 1) * size : 0 : block);
    for (int64_t part = 0; part < parts; part++) {
        const double *found = rows[part];
        for (int i = 0; i < PEAK; i++)
            if (i != ELEMENTS && (i < GRAD_A_N || i >= HISTOGRAM) && (sigmoid || (i != GATE_LEFT && i != GATE_RIGHT))) row[i] += found[i];
        for (int i = PEAK; i < WIDTH; i++) row[i] = found[i] > row[i] ? found[i] : row[i];
    }
    for (int64_t part = 1; others && part < parts; part++)
        for (int64_t i = 0; i < size; i++) block[i] += others[(part - 1) * size + i];
    free(others);
    row[ELEMENTS] += elements;
}

/* The row and the block of heads [6, heads] of a softmax, as observe_softmax of statistics.py states them.
   z: [batch, heads, queries, keys] with these sizes and strides; visible: bytes, with strides of its own (0 where it is broadcast). */
void torchsat_softmax(const vector *z_in, const uint8_t *visible, const int64_t *sizes, const int64_t *z_strides, const int64_t *visible_strides,
                      double elements, double *row, double *heads)
{
    int64_t size = sizes[1], keys = sizes[3];
    double z[BLOCK], seen[BLOCK];
    int64_t width = z_in->kind == FLOAT64 ? 8 : z_in->kind == FLOAT32 ? 4 : 2;
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
                /* e^-745 is the least number above 0 in float64. */
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
        heads[at[1]] += 1;
        heads[size + at[1]] += (log_total - weighted / total) / log_keys;
        heads[2 * size + at[1]] += 1 - total_square / (total * total);
        heads[3 * size + at[1]] += deviation / n;
        heads[4 * size + at[1]] += log_keys;
        if (top > heads[5 * size + at[1]]) heads[5 * size + at[1]] = top;
        row[N] += n;
        row[Z] += sum;
        row[Z_SQ] += square;
        row[A] += 1;
        row[A_SQ] += total_square / (total * total);
        row[ZEROS] += n - nonzero;
        if (top > row[Z_MAX]) row[Z_MAX] = top;
        if (-bottom > row[Z_MIN_NEGATED]) row[Z_MIN_NEGATED] = -bottom;
        if (1 / total > row[A_MAX]) row[A_MAX] = 1 / total;
        if (-least / total > row[A_MIN_NEGATED]) row[A_MIN_NEGATED] = -least / total;
    }
}

/* Merge the gradient's columns into a row; either vector may be missing (data NULL). */
void torchsat_gradient(const vector *grad_a, const vector *grad_z, int64_t count, double *row)
{
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
    row[GRAD_A_N] += grad_a->data ? n : 0;
    row[GRAD_A_SQ] += a2;
    row[GRAD_Z_N] += grad_z->data ? n : 0;
    row[GRAD_Z_SQ] += z2;
    row[GRAD_NONFINITE] += (double)count - n;
}

/* [samples, sum x, sum x^2] of each unit: added to sums [3, size]. */
void torchsat_features(const vector *x_in, int64_t count, const axis *units, double *sums)
{
    double x[BLOCK];
    walk at = begin(units);
    double *samples = sums, *first_power = sums + units->size, *second_power = sums + 2 * units->size;
    for (int64_t first = 0; first < count; first += BLOCK) {
        int m = count - first < BLOCK ? (int)(count - first) : BLOCK;
        load(x_in, first, m, x);
        for (int i = 0; i < m; i++) {
            int64_t unit = next(&at);
            double good = x[i] * 0 == 0 ? 1.0 : 0.0, v = good != 0 ? x[i] : 0.0;
            samples[unit] += good;
            first_power[unit] += v;
            second_power[unit] += v * v;
        }
    }
}

/* The sum of squares, and where `other` has data, also that of the differences (out[1]). */
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

/* UNITS of a unit block [2, size]: units, those with `enough` samples, those of them saturated in `share` of these, the least samples. */
void torchsat_units(const double *block, int64_t size, double enough, double share, double *out)
{
    double measured = 0, stuck = 0, least = INFINITY;
    for (int64_t unit = 0; unit < size; unit++) {
        double samples = block[unit], full = samples >= enough ? 1.0 : 0.0;
        measured += full;
        stuck += block[size + unit] >= share * samples ? full : 0;
        least = samples < least ? samples : least;
    }
    out[0] = (double)size;
    out[1] = measured;
    out[2] = stuck;
    out[3] = least;
}

/* Set a unit block to 0 if every unit has `enough` samples. */
void torchsat_restart(double *block, int64_t size, double enough)
{
    for (int64_t unit = 0; unit < size; unit++)
        if (!(block[unit] >= enough)) return;
    memset(block, 0, (size_t)(2 * size) * sizeof *block);
}

/* Of [3, size] as torchsat_features fills it: all samples, the mean square, and the mean over features of the squared mean, without the 1/n
   bias of a squared sample mean: of pairs of distinct samples only. */
void torchsat_inputs(const double *sums, int64_t size, double *out)
{
    double samples = 0, square = 0, offset = 0, features = 0;
    for (int64_t at = 0; at < size; at++) {
        double n = sums[at], first = sums[size + at], second = sums[2 * size + at], pairs = n * (n - 1);
        samples += n;
        square += second;
        offset += pairs > 0 ? (first * first - second) / pairs : 0;
        features += pairs > 0 ? 1 : 0;
    }
    out[0] = samples;
    out[1] = square / samples;
    out[2] = offset / features;
}
