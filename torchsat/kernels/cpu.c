/* The rows of statistics.py in one pass over memory. cpu.py compiles this file on the user's machine, if there is a C compiler.

   The elements of a vector lie `stride` apart. They are read in blocks that stay in the first-level cache: each block is converted to double once,
   and then reduced by loops that the compiler vectorises. All sums are double. An element counts only if all that is read of it is finite.

   tests/test_kernels.py compares every column with the plain implementation. */

#include "vectors.h"

#define BANKS 8
#define SATURATED_ONE ((int64_t)1 << 32)

/* |f'|, as a formula of z or GIVEN as a vector. The formulas are those of formulas.py:
   LOGISTIC  c s(b z) s(-b z), where s is the logistic function
   BETWEEN   c where b < z < d, else 0
   SILU      |s(z) (1 + z s(-z))|
   GELU      |s(u) + z s(u) s(-u) u'|, where u = 2 sqrt(2 / pi) (z + 0.044715 z^3): the approximation by tanh */
enum { GIVEN, LOGISTIC, BETWEEN, SILU, GELU };
typedef struct { int64_t kind; double b, c, d; vector given; } derivative;

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

/* The row of elements `begin_at` to `end_at` of a forward call, each with the weight 1, without the column ELEMENTS. Unless it is NULL, each element
   enters a tally of its unit: as 1 and, if it is saturated, as SATURATED_ONE too, so that one addition counts both. Its |a| is added to the sizes of its
   unit. Neighbours take turns between the two rows of tallies [2, units], and of sizes, since an addition to the same unit would wait for the one
   before. */
static void observe(const call *in, int64_t begin_at, int64_t end_at, double *row, const axis *units, int64_t *tallies, double *sizes)
{
    double z[BLOCK], a[BLOCK], slope[BLOCK], ok[BLOCK], saturated[BLOCK];
    int32_t bin[BLOCK], found[BLOCK];
    int64_t tally[BLOCK], counted[BANKS][BINS + 1];
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
                index = index > BINS - 1 ? BINS - 1 : index;
                bin[i] = ok[i] != 0 ? index : BINS;
            }
            /* Neighbours often fall into the same bin, and an addition would wait for the one before: hence several tables. */
            for (int i = 0; i < m; i++) counted[i % BANKS][bin[i]]++;
        }
        if (tallies) {
            const int32_t *unit_of = units->table ? units->table + first : found;
            if (!units->table) find_units(units, first, m, found);
#pragma omp simd
            for (int i = 0; i < m; i++) tally[i] = ok[i] != 0 ? saturated[i] != 0 ? SATURATED_ONE | 1 : 1 : 0;
            for (int i = 0; i < m; i++) {
                int64_t at = (i & 1) * units->size + unit_of[i];
                tallies[at] += tally[i];
                sizes[at] += fabs(a[i]);
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

/* Merge one forward call into a row, and add the samples of each unit to block [4, size], unless it is NULL. `count` of its `elements` were read.
   low, high, peak: NaN where there is none. The elements are divided among `parts` threads. exact: what torchsat_extremes has found among all elements
   of the call, if only some were read; otherwise NULL. */
void torchsat_observe(const vector *z, const vector *a, const derivative *of, int64_t count, double elements, double low, double high,
                      double peak, int64_t sigmoid, int64_t parts, const double *exact, double *row, const axis *units, double *block)
{
    call in = { z, a, of, low, high, peak, sigmoid };
    double rows[PARTS][WIDTH], weight = count ? elements / (double)count : 1;
    int64_t size = block ? units->size : 0, *tallies = 0;
    double *sizes = 0;
    if (parts > PARTS) parts = PARTS;
    if (block) {
        tallies = calloc((size_t)(2 * size * parts), sizeof *tallies);
        sizes = calloc((size_t)(2 * size * parts), sizeof *sizes);
        if (!sizes) {
            free(tallies);
            tallies = 0;
        }
    }
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) if (parts > 1)
#endif
    for (int64_t part = 0; part < parts; part++)
        observe(&in, count * part / parts, count * (part + 1) / parts, rows[part], units, tallies ? tallies + 2 * size * part : 0,
                tallies ? sizes + 2 * size * part : 0);
    for (int64_t part = 0; part < parts; part++) {
        if (exact) rows[part][NONFINITE] = 0;
        merge(row, rows[part], weight);
    }
    if (exact) {
        static const int at[] = { NONFINITE, Z_MAX, Z_MIN_NEGATED, A_MAX, A_MIN_NEGATED };
        row[NONFINITE] += exact[BAD];
        for (int i = 1; i < FOUND; i++) row[at[i]] = exact[i] > row[at[i]] ? exact[i] : row[at[i]];
    }
    for (int64_t each = 0; tallies && each < 2 * parts; each++)
        for (int64_t i = 0; i < size; i++) {
            double samples = (double)(tallies[each * size + i] & (SATURATED_ONE - 1)), saturated = (double)(tallies[each * size + i] / SATURATED_ONE);
            block[SAMPLES * size + i] += weight * samples;
            block[SATURATED * size + i] += weight * saturated;
            block[SAMPLES_READ * size + i] += samples;
            block[A_ABS * size + i] += weight * sizes[each * size + i];
        }
    free(tallies);
    free(sizes);
    row[ELEMENTS] += elements;
}

/* Write for each element whether it lies in the high tail (1), in the low one (-1), or in neither (0). An edge is NaN where there is no tail. */
void torchsat_sides(const vector *z_in, int64_t count, double low, double high, int8_t *out)
{
    double z[BLOCK];
    for (int64_t first = 0; first < count; first += BLOCK) {
        int m = count - first < BLOCK ? (int)(count - first) : BLOCK;
        load(z_in, first, m, z);
#pragma omp simd
        for (int i = 0; i < m; i++) out[first + i] = (int8_t)((z[i] >= high) - (z[i] <= low));
    }
}

/* Merge one backward call into a row. The data of a vector are NULL where that gradient is not known. `count` of its `elements` were read. sides: what
   torchsat_sides wrote for these elements; NULL where that is not known. */
void torchsat_gradient(const vector *grad_a, const vector *grad_z, int64_t count, double elements, const int8_t *sides, double *row)
{
    double weight = count ? elements / (double)count : 1;
    double a[BLOCK] = { 0 }, z[BLOCK] = { 0 };
    double n = 0, a2 = 0, z2 = 0, demand = 0, leaving = 0, blocked = 0, trapped = 0;
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
            a[i] = u;
        }
        if (!sides) continue;
#pragma omp simd reduction(+ : demand, leaving, blocked, trapped)
        for (int i = 0; i < m; i++) {
            double size = fabs(a[i]), side = sides[first + i];
            demand += size;
            blocked += side != 0 ? size : 0;
            leaving += side * a[i] > 0 ? 1 : 0;
            trapped += side * a[i] > 0 ? size : 0;
        }
    }
    row[DEMAND] += weight * demand;
    row[LEAVING] += weight * leaving;
    row[BLOCKED] += weight * blocked;
    row[TRAPPED] += weight * trapped;
    row[GRAD_A_N] += grad_a->data ? weight * n : 0;
    row[GRAD_A_READ] += grad_a->data ? n : 0;
    row[GRAD_A_SQ] += weight * a2;
    row[GRAD_Z_N] += grad_z->data ? weight * n : 0;
    row[GRAD_Z_READ] += grad_z->data ? n : 0;
    row[GRAD_Z_SQ] += weight * z2;
    row[GRAD_NONFINITE] += (double)count - n;
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
