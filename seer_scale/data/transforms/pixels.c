/* What is done to the pixels of a crop: its resizing; flip, colour jitter and grey in one pass over it (two where the
   contrast needs its mean first), from interleaved to planar uint8; its blur. Blocks stay in the first cache; loops are
   plain, for compilers to vectorise. */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* What native.py is to find: another number with every change of what a kernel takes. */
int interface(void) { return 2; }

/* Built once for each instruction set (setup.py): every operation is done as it is written, none fused or reordered, so
   that all of them give the same bytes. */
int supported(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#if defined(__AVX512BW__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2");
#else
    return 1;
#endif
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(kind, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(kind, a, b, ...) __builtin_shuffle(a, b, (kind){__VA_ARGS__})
#endif

#define BLOCK 512
enum { BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY };

typedef uint8_t v16 __attribute__((vector_size(16)));

/* n interleaved pixels to three planes of floats. */
static void take_apart(const uint8_t *restrict rgb, float *restrict r, float *restrict g, float *restrict b, int n) {
    uint8_t bytes[3][BLOCK + 16];
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        v16 x, y, z;
        memcpy(&x, rgb + 3 * i, 16); memcpy(&y, rgb + 3 * i + 16, 16); memcpy(&z, rgb + 3 * i + 32, 16);
        const v16 R = SHUFFLE(v16, SHUFFLE(v16, x, y, 0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0, 0, 0, 0, 0), z,
                              0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 20, 23, 26, 29);
        const v16 G = SHUFFLE(v16, SHUFFLE(v16, x, y, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 0, 0, 0, 0, 0), z,
                              0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 21, 24, 27, 30);
        const v16 B = SHUFFLE(v16, SHUFFLE(v16, x, y, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0, 0, 0, 0, 0, 0), z,
                              0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19, 22, 25, 28, 31);
        memcpy(bytes[0] + i, &R, 16); memcpy(bytes[1] + i, &G, 16); memcpy(bytes[2] + i, &B, 16);
    }
    for (; i < n; i++) for (int c = 0; c < 3; c++) bytes[c][i] = rgb[3 * i + c];
    for (i = 0; i < n; i++) r[i] = bytes[0][i];
    for (i = 0; i < n; i++) g[i] = bytes[1][i];
    for (i = 0; i < n; i++) b[i] = bytes[2][i];
}

static inline float clamp(float x) { return x < 0 ? 0 : x > 255 ? 255 : x; }
static inline float luma(float r, float g, float b) { return 0.299f * r + 0.587f * g + 0.114f * b; }

static void hue(float *restrict r, float *restrict g, float *restrict b, int n, float shift) {
    const float turn = 6 * shift;
    for (int i = 0; i < n; i++) {
        const float R = r[i], G = g[i], B = b[i];
        const float v = fmaxf(R, fmaxf(G, B)), d = v - fminf(R, fminf(G, B));
        const float inv = 1.0f / (d + (d == 0));
        float h = v == R ? (G - B) * inv : v == G ? (B - R) * inv + 2 : (R - G) * inv + 4;
        h += turn + 6; /* at least -1 - 3 + 6, and h + 5 at most 19 */
        float k5 = h + 5, k3 = h + 3, k1 = h + 1;
        k5 -= 6 * floorf(k5 * (1.0f / 6)); k3 -= 6 * floorf(k3 * (1.0f / 6)); k1 -= 6 * floorf(k1 * (1.0f / 6));
        r[i] = v - d * fmaxf(0, fminf(1, fminf(k5, 4 - k5)));
        g[i] = v - d * fmaxf(0, fminf(1, fminf(k3, 4 - k3)));
        b[i] = v - d * fmaxf(0, fminf(1, fminf(k1, 4 - k1)));
    }
}

static void apply(int op, float f, float mean, float *restrict r, float *restrict g, float *restrict b, int n) {
    switch (op) {
    case BRIGHTNESS:
        for (int i = 0; i < n; i++) { r[i] = clamp(r[i] * f); g[i] = clamp(g[i] * f); b[i] = clamp(b[i] * f); }
        break;
    case CONTRAST: {
        const float c = (1 - f) * mean;
        for (int i = 0; i < n; i++) { r[i] = clamp(r[i] * f + c); g[i] = clamp(g[i] * f + c); b[i] = clamp(b[i] * f + c); }
        break;
    }
    case SATURATION:
        for (int i = 0; i < n; i++) {
            const float y = (1 - f) * luma(r[i], g[i], b[i]);
            r[i] = clamp(r[i] * f + y); g[i] = clamp(g[i] * f + y); b[i] = clamp(b[i] * f + y);
        }
        break;
    case HUE: hue(r, g, b, n, f); break;
    case GREY:
        for (int i = 0; i < n; i++) r[i] = g[i] = b[i] = luma(r[i], g[i], b[i]);
    }
}

/* image: [height, width, 3]; out: [3, height, width]; ops, factors: what to do in turn. */
void photometric(const uint8_t *restrict image, int height, int width, int flip, int num, const int *ops,
                 const float *factors, uint8_t *restrict out) {
    const int plane = height * width;
    float planes[3][BLOCK], mean = 0;
    int contrast = num;
    for (int i = 0; i < num; i++) if (ops[i] == CONTRAST) contrast = i;
    if (contrast < num) {
        double sum = 0;
        for (int y = 0; y < height; y++) {
            const uint8_t *row = image + 3 * y * width;
            for (int x = 0; x < width; x += BLOCK) {
                const int n = width - x < BLOCK ? width - x : BLOCK;
                take_apart(row + 3 * x, planes[0], planes[1], planes[2], n);
                for (int k = 0; k < contrast; k++) apply(ops[k], factors[k], 0, planes[0], planes[1], planes[2], n);
                float lanes[16] = {0};
                for (int i = n; i % 16; i++) planes[0][i] = planes[1][i] = planes[2][i] = 0;
                for (int i = 0; i < n; i += 16)
                    for (int j = 0; j < 16; j++) lanes[j] += luma(planes[0][i + j], planes[1][i + j], planes[2][i + j]);
                for (int j = 0; j < 16; j++) sum += lanes[j];
            }
        }
        mean = sum / plane;
    }
    for (int y = 0; y < height; y++) {
        const uint8_t *row = image + 3 * y * width;
        for (int x = 0; x < width; x += BLOCK) {
            const int n = width - x < BLOCK ? width - x : BLOCK;
            take_apart(row + 3 * x, planes[0], planes[1], planes[2], n);
            for (int k = 0; k < num; k++) apply(ops[k], factors[k], mean, planes[0], planes[1], planes[2], n);
            for (int c = 0; c < 3; c++) {
                uint8_t *to = out + c * plane + y * width;
                if (flip) for (int i = 0; i < n; i++) to[width - 1 - x - i] = (uint8_t)(planes[c][i] + 0.5f);
                else for (int i = 0; i < n; i++) to[x + i] = (uint8_t)(planes[c][i] + 0.5f);
            }
        }
    }
}

/* Where index i of n lies once the border mirrors, its own pixel not repeated. */
static inline int mirror(int i, int n) {
    const int period = n > 1 ? 2 * n - 2 : 1;
    i = (i % period + period) % period;
    return i < n ? i : period - i;
}

/* In place on [3, height, width]; weights: 2 * radius + 1; scratch: height * width + width + 2 * radius floats. */
void blur(uint8_t *restrict planes, int height, int width, int radius, const float *restrict weights,
          float *restrict scratch) {
    float *across = scratch, *line = scratch + height * width;
    for (int c = 0; c < 3; c++) {
        uint8_t *plane = planes + c * height * width;
        for (int y = 0; y < height; y++) {
            const uint8_t *row = plane + y * width;
            for (int i = 0; i < radius; i++) {
                line[i] = row[mirror(i - radius, width)];
                line[width + radius + i] = row[mirror(width + i, width)];
            }
            for (int i = 0; i < width; i++) line[radius + i] = row[i];
            float *to = across + y * width;
            const float w0 = weights[radius];
            for (int i = 0; i < width; i++) to[i] = w0 * line[radius + i];
            for (int k = 1; k <= radius; k++) {
                const float w = weights[radius + k];
                const float *a = line + radius - k, *b = line + radius + k;
                for (int i = 0; i < width; i++) to[i] += w * (a[i] + b[i]);
            }
        }
        for (int y = 0; y < height; y++) {
            const float *row = across + y * width;
            const float w0 = weights[radius];
            for (int i = 0; i < width; i++) line[i] = w0 * row[i] + 0.5f;
            for (int k = 1; k <= radius; k++) {
                const float w = weights[radius + k];
                const float *a = across + mirror(y - k, height) * width, *b = across + mirror(y + k, height) * width;
                for (int i = 0; i < width; i++) line[i] += w * (a[i] + b[i]);
            }
            uint8_t *to = plane + y * width;
            for (int i = 0; i < width; i++) to[i] = (uint8_t)line[i];
        }
    }
}

/* ------------------------------------------------------------------------------------------------------- resizing */

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint8_t b8 __attribute__((vector_size(8)));

/* Where `size` outputs of `n` inputs look, and how much they weigh: a triangle, widened where the axis shrinks (Pillow's
   BILINEAR). first, count: [size]; weights: [size][taps]. */
static void triangle(int n, int size, int taps, int *first, int *count, float *weights) {
    const double scale = (double)n / size, reach = scale > 1 ? scale : 1;
    for (int o = 0; o < size; o++) {
        const double centre = (o + 0.5) * scale;
        int from = (int)(centre - reach + 0.5), to = (int)(centre + reach + 0.5);
        from = from < 0 ? 0 : from; to = to > n ? n : to;
        float *w = weights + (long)o * taps;
        double sum = 0;
        for (int i = from; i < to; i++) { const double d = fabs((i - centre + 0.5) / reach); sum += w[i - from] = d < 1 ? 1 - d : 0; }
        for (int i = from; i < to; i++) w[i - from] /= sum;
        first[o] = from; count[o] = to - from;
    }
}

static inline void transpose(f8 v[8]) {
    f8 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = SHUFFLE(i8, v[i], v[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        a[i + 1] = SHUFFLE(i8, v[i], v[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) for (int j = 0; j < 2; j++) {
        b[i + j] = SHUFFLE(i8, a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        b[i + j + 2] = SHUFFLE(i8, a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int j = 0; j < 4; j++) {
        v[j] = SHUFFLE(i8, b[j], b[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        v[j + 4] = SHUFFLE(i8, b[j], b[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* n sums over `num` rows. */
static void weigh(const uint8_t *restrict p, long stride, const float *restrict w, int num, int n, float *restrict sums) {
    int k = num % 2;
    if (k) for (int i = 0; i < n; i++) sums[i] = w[0] * p[i];
    else { const uint8_t *restrict q = p + stride; for (int i = 0; i < n; i++) sums[i] = w[0] * p[i] + w[1] * q[i]; k = 2; }
    for (; k < num; k += 2) {
        const uint8_t *restrict a = p + k * stride, *restrict b = a + stride;
        const float u = w[k], v = w[k + 1];
        for (int i = 0; i < n; i++) sums[i] += u * a[i] + v * b[i];
    }
}

/* RGB [height, width] at src, rows `stride` bytes apart, to [to_height, to_width]. Eight output rows at a time: down
   first, turned so that the eight lie side by side, then across. scratch: 16 * (3 * width + 8) floats, and for each axis
   as many times as it has outputs 2 * ceil(how often these go into its inputs, 1 at least) + 4. */
void resize(const uint8_t *src, long stride, int height, int width, int to_height, int to_width, uint8_t *dst,
            float *scratch) {
    const int tall = 2 * (int)ceil(height > to_height ? (double)height / to_height : 1) + 2;
    const int wide = 2 * (int)ceil(width > to_width ? (double)width / to_width : 1) + 2, n = 3 * width;
    float *down = scratch, *across = down + (long)to_height * tall, *turned = across + (long)to_width * wide;
    float *sums = turned + 8 * (n + 8L);
    int *top = (int *)(sums + 8 * (n + 8L)), *rows = top + to_height;
    int *left = rows + to_height, *columns = left + to_width;
    triangle(height, to_height, tall, top, rows, down);
    triangle(width, to_width, wide, left, columns, across);
    for (int y = 0; y < to_height; y += 8) {
        const int live = to_height - y < 8 ? to_height - y : 8;
        for (int r = 0; r < 8; r++) {
            const int o = y + (r < live ? r : live - 1);
            weigh(src + top[o] * stride, stride, down + (long)o * tall, rows[o], n, sums + (long)r * (n + 8));
        }
        for (int x = 0; x < n; x += 8) {
            f8 v[8];
            for (int r = 0; r < 8; r++) memcpy(v + r, sums + (long)r * (n + 8) + x, sizeof *v);
            transpose(v);
            memcpy(turned + 8L * x, v, sizeof v);
        }
        for (int e = 0; e < 3 * to_width; e += 8) {
            f8 v[8];
            for (int j = 0; j < 8; j++) {
                const int at = e + j < 3 * to_width ? e + j : 3 * to_width - 1, o = at / 3, c = at % 3;
                const float *w = across + (long)o * wide, *p = turned + 8L * (3 * left[o] + c);
                f8 sum = {0};
                for (int k = 0; k < columns[o]; k++) { f8 t; memcpy(&t, p + 24L * k, sizeof t); sum += w[k] * t; }
                v[j] = sum + 0.5f;
            }
            transpose(v);
            for (int r = 0; r < live; r++) {
                const b8 bytes = __builtin_convertvector(__builtin_convertvector(v[r], i8), b8);
                memcpy(dst + 3L * to_width * (y + r) + e, &bytes, 3 * to_width - e < 8 ? 3 * to_width - e : 8);
            }
        }
    }
}
