/* Which elements of a tensor are read, the extremes of all of them, and the sums by feature.

   Extremes are found among the bits of the elements, taken as whole numbers: with all bits but the sign turned over where it is set, they are in the
   order of the numbers, and inf and nan lie beyond all others. So one pass of two comparisons, for which nothing is converted, finds the extremes and
   whether anything is not finite. Only then is a stretch read again, number by number.

   tests/test_kernels.py compares every result with the plain implementation. */

#include "vectors.h"

/* Elements whose extremes are found at a time. They stay in the first-level cache, so that the sample is taken from there. */
#define STRETCH 4096

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

/* The largest and the smallest key of `m` elements that are words of so many bits. */
#define SCAN(name, WORD, BITS, LARGEST)                                                                                                               \
    static void name(const WORD *restrict words, int m, int64_t *high, int64_t *low)                                                                  \
    {                                                                                                                                                 \
        WORD top = -LARGEST - 1, bottom = LARGEST;                                                                                                    \
        _Pragma("omp simd reduction(max : top) reduction(min : bottom)") for (int i = 0; i < m; i++)                                                  \
        {                                                                                                                                             \
            WORD key = (WORD)(words[i] ^ ((words[i] >> (BITS - 1)) & LARGEST));                                                                       \
            top = key > top ? key : top;                                                                                                              \
            bottom = key < bottom ? key : bottom;                                                                                                     \
        }                                                                                                                                             \
        *high = top;                                                                                                                                  \
        *low = bottom;                                                                                                                                \
    }
SCAN(scan_16, int16_t, 16, INT16_MAX)
SCAN(scan_32, int32_t, 32, INT32_MAX)
SCAN(scan_64, int64_t, 64, INT64_MAX)

/* The number that has this key. */
static double number_of(int64_t key, int64_t kind)
{
    int64_t bits = kind == FLOAT64 ? key ^ ((key >> 63) & INT64_MAX) : kind == FLOAT32 ? key ^ ((key >> 63) & INT32_MAX) : key ^ ((key >> 63) & INT16_MAX);
    int32_t word = (int32_t)bits;
    int16_t half_word = (int16_t)bits;
    vector one = { kind == FLOAT64 ? (void *)&bits : kind == FLOAT32 ? (void *)&word : (void *)&half_word, kind, 1 };
    double value;
    load(&one, 0, 1, &value);
    return value;
}

/* Merge `m` elements, which are neighbours, into the largest number and minus the smallest one. Where one of them is inf or nan, nothing is merged and
   the result is 0. */
static int merge_finite(const vector *of, int64_t first, int m, double *top, double *bottom_negated)
{
    int64_t infinite = of->kind == FLOAT64 ? 0x7ff0000000000000 : of->kind == FLOAT32 ? 0x7f800000 : of->kind == BFLOAT16 ? 0x7f80 : 0x7c00, high, low;
    const char *data = (const char *)of->data + first * width_of(of);
    if (of->kind == FLOAT64)
        scan_64((const int64_t *)data, m, &high, &low);
    else if (of->kind == FLOAT32)
        scan_32((const int32_t *)data, m, &high, &low);
    else
        scan_16((const int16_t *)data, m, &high, &low);
    if (high >= infinite || low <= ~infinite) return 0;
    double largest = number_of(high, of->kind), smallest = -number_of(low, of->kind);
    *top = largest > *top ? largest : *top;
    *bottom_negated = smallest > *bottom_negated ? smallest : *bottom_negated;
    return 1;
}

/* Merge elements `first` to `first` + `length` of z and a, number by number. Those that are inf or nan in either are counted. */
static void merge_numbers(const vector *z_in, const vector *a_in, int64_t first, int64_t length, double *found)
{
    double z[BLOCK], a[BLOCK];
    double bad = 0, z_top = -INFINITY, z_low = -INFINITY, a_top = -INFINITY, a_low = -INFINITY;
    for (int64_t end = first + length; first < end; first += BLOCK) {
        int m = end - first < BLOCK ? (int)(end - first) : BLOCK;
        load(z_in, first, m, z);
        load(a_in, first, m, a);
#pragma omp simd reduction(+ : bad) reduction(max : z_top, z_low, a_top, a_low)
        for (int i = 0; i < m; i++) {
            int good = z[i] * 0 + a[i] * 0 == 0;
            double v = good ? z[i] : -INFINITY, v_low = good ? -z[i] : -INFINITY, u = good ? a[i] : -INFINITY, u_low = good ? -a[i] : -INFINITY;
            bad += good ? 0.0 : 1.0;
            z_top = v > z_top ? v : z_top;
            z_low = v_low > z_low ? v_low : z_low;
            a_top = u > a_top ? u : a_top;
            a_low = u_low > a_low ? u_low : a_low;
        }
    }
    found[BAD] += bad;
    found[Z_TOP] = z_top > found[Z_TOP] ? z_top : found[Z_TOP];
    found[Z_BOTTOM_NEGATED] = z_low > found[Z_BOTTOM_NEGATED] ? z_low : found[Z_BOTTOM_NEGATED];
    found[A_TOP] = a_top > found[A_TOP] ? a_top : found[A_TOP];
    found[A_BOTTOM_NEGATED] = a_low > found[A_BOTTOM_NEGATED] ? a_low : found[A_BOTTOM_NEGATED];
}

/* Merge elements `first` to `end` of z and a, or of z alone where `a` has no data. */
static void merge_stretch(const vector *z, const vector *a, int64_t first, int64_t end, double *found)
{
    for (; first < end; first += STRETCH) {
        int m = end - first < STRETCH ? (int)(end - first) : STRETCH;
        /* On a copy, since of two tensors neither counts where the other one is not finite. */
        double merged[FOUND];
        memcpy(merged, found, sizeof merged);
        if (z->stride == 1 && (!a->data || a->stride == 1) && merge_finite(z, first, m, merged + Z_TOP, merged + Z_BOTTOM_NEGATED) &&
            (!a->data || merge_finite(a, first, m, merged + A_TOP, merged + A_BOTTOM_NEGATED)))
            memcpy(found, merged, sizeof merged);
        else {
            merge_numbers(z, a->data ? a : z, first, m, found);
            if (!a->data) found[A_TOP] = found[A_BOTTOM_NEGATED] = -INFINITY;
        }
    }
}

/* The extremes of `count` elements z and a, and how many are inf or nan, in found[FOUND]. They lie in rows of `columns` elements, which are `z_row` and
   `a_row` elements apart in memory; the last row may be shorter. Where `a` has no data, its columns are not defined. */
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
        nothing_found(each[part]);
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
            vector z = { (const char *)z_in->data + row * z_row * width_of(z_in), z_in->kind, z_in->stride };
            vector a = { a_in->data ? (const char *)a_in->data + row * a_row * width_of(a_in) : 0, a_in->kind, a_in->stride };
            merge_stretch(&z, &a, 0, count - row * columns < columns ? count - row * columns : columns, each[part]);
        }
    }
    merge_found(each, parts, found);
}

/* Elements at these places of a vector of neighbours. */
static void gather(const vector *from, const int64_t *place, int m, void *to)
{
    if (from->kind == FLOAT64)
        for (int i = 0; i < m; i++) ((int64_t *)to)[i] = ((const int64_t *)from->data)[place[i]];
    else if (from->kind == FLOAT32)
        for (int i = 0; i < m; i++) ((int32_t *)to)[i] = ((const int32_t *)from->data)[place[i]];
    else
        for (int i = 0; i < m; i++) ((int16_t *)to)[i] = ((const int16_t *)from->data)[place[i]];
}

/* What a call takes: those `read` elements of `count` that lie at these places, as torchsat_places gives them in 32 bits. They lie in rows of `columns`
   neighbours, which are `row` elements apart in memory. */
typedef struct { int64_t count, columns, row, read; const int32_t *places; } choice;

/* Write the elements of a choice to `taken`. Unless found[FOUND] is NULL, also find the extremes of all elements, as those of z or of a; they must be
   one row then. Both are done stretch by stretch: memory is read once, in its order. */
void torchsat_take(const vector *from, const choice *of, int64_t is_z, int64_t parts, void *taken, double *found)
{
    static const vector none = { 0, 0, 0 };
    double each[PARTS][FOUND], length = (double)of->count / (double)of->read;
    int64_t strata = (int64_t)(STRETCH / length) + 1;
    if (strata > BLOCK) strata = BLOCK;
    if (parts > PARTS) parts = PARTS;
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) if (parts > 1)
#endif
    for (int64_t part = 0; part < parts; part++) {
        int64_t place[BLOCK], first = of->read * part / parts, last = of->read * (part + 1) / parts;
        int64_t from_at = (int64_t)(length * (double)first);
        nothing_found(each[part]);
        for (; first < last; first += strata) {
            int m = last - first < strata ? (int)(last - first) : (int)strata;
            int64_t end = first + m == of->read ? of->count : (int64_t)(length * (double)(first + m));
            if (found) merge_stretch(from, &none, from_at, end, each[part]);
            from_at = end;
            for (int i = 0; i < m; i++) place[i] = of->places[first + i];
            if (of->row != of->columns)
                for (int i = 0; i < m; i++) place[i] += (int64_t)((double)place[i] / (double)of->columns) * (of->row - of->columns);
            gather(from, place, m, (char *)taken + first * width_of(from));
        }
    }
    if (!found) return;
    merge_found(each, parts, found);
    if (is_z) return;
    for (int i = 0; i < 2; i++) {
        found[A_TOP + i] = found[Z_TOP + i];
        found[Z_TOP + i] = -INFINITY;
    }
}

/* Write the unit of each element that is read. */
void torchsat_units(const axis *of, int32_t *out)
{
    for (int64_t first = 0; first < of->read; first += BLOCK) find_units(of, first, of->read - first < BLOCK ? (int)(of->read - first) : BLOCK, out + first);
}

/* Add the samples, the sum of x and the sum of x^2 of each unit to sums [3, size], each sample with the weight 1. */
void torchsat_features(const vector *x_in, int64_t count, const axis *units, double *sums)
{
    double x[BLOCK];
    int32_t found[BLOCK];
    double *samples = sums, *first_power = sums + units->size, *second_power = sums + 2 * units->size;
    for (int64_t first = 0; first < count; first += BLOCK) {
        int m = count - first < BLOCK ? (int)(count - first) : BLOCK;
        load(x_in, first, m, x);
        const int32_t *unit_of = units->table ? units->table + first : found;
        if (!units->table) find_units(units, first, m, found);
        for (int i = 0; i < m; i++) {
            int32_t unit = unit_of[i];
            double good = x[i] * 0 == 0 ? 1.0 : 0.0, v = good != 0 ? x[i] : 0.0;
            samples[unit] += good;
            first_power[unit] += v;
            second_power[unit] += v * v;
        }
    }
}
