/* Flip, colour jitter and grey of a crop in one pass over it (two where the contrast needs its mean first), from
   interleaved to planar uint8, and its blur. Blocks stay in the first cache; loops are plain, for compilers to vectorise. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 512
enum { BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY };

typedef uint8_t v16 __attribute__((vector_size(16)));
typedef float f16 __attribute__((vector_size(64)));

/* n interleaved pixels to three planes of floats. */
static void take_apart(const uint8_t *restrict rgb, float *restrict r, float *restrict g, float *restrict b, int n) {
    uint8_t bytes[3][BLOCK + 16];
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        v16 x, y, z;
        memcpy(&x, rgb + 3 * i, 16); memcpy(&y, rgb + 3 * i + 16, 16); memcpy(&z, rgb + 3 * i + 32, 16);
        const v16 R = __builtin_shuffle(__builtin_shuffle(x, y, (v16){0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30}), z, (v16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 20, 23, 26, 29});
        const v16 G = __builtin_shuffle(__builtin_shuffle(x, y, (v16){1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31}), z, (v16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 21, 24, 27, 30});
        const v16 B = __builtin_shuffle(__builtin_shuffle(x, y, (v16){2, 5, 8, 11, 14, 17, 20, 23, 26, 29}), z, (v16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19, 22, 25, 28, 31});
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

/* image: [size, size, 3]; out: [3, size, size]; ops, factors: what to do in turn. */
void photometric(const uint8_t *restrict image, int size, int flip, int num, const int *ops, const float *factors,
                 uint8_t *restrict out) {
    const int plane = size * size;
    float planes[3][BLOCK], mean = 0;
    int contrast = num;
    for (int i = 0; i < num; i++) if (ops[i] == CONTRAST) contrast = i;
    if (contrast < num) {
        double sum = 0;
        for (int y = 0; y < size; y++) {
            const uint8_t *row = image + 3 * y * size;
            for (int x = 0; x < size; x += BLOCK) {
                const int n = size - x < BLOCK ? size - x : BLOCK;
                take_apart(row + 3 * x, planes[0], planes[1], planes[2], n);
                for (int k = 0; k < contrast; k++) apply(ops[k], factors[k], 0, planes[0], planes[1], planes[2], n);
                float part = 0;
                for (int i = 0; i < n; i++) part += luma(planes[0][i], planes[1][i], planes[2][i]);
                sum += part;
            }
        }
        mean = sum / plane;
    }
    for (int y = 0; y < size; y++) {
        const uint8_t *row = image + 3 * y * size;
        for (int x = 0; x < size; x += BLOCK) {
            const int n = size - x < BLOCK ? size - x : BLOCK;
            take_apart(row + 3 * x, planes[0], planes[1], planes[2], n);
            for (int k = 0; k < num; k++) apply(ops[k], factors[k], mean, planes[0], planes[1], planes[2], n);
            for (int c = 0; c < 3; c++) {
                uint8_t *to = out + c * plane + y * size;
                if (flip) for (int i = 0; i < n; i++) to[size - 1 - x - i] = (uint8_t)(planes[c][i] + 0.5f);
                else for (int i = 0; i < n; i++) to[x + i] = (uint8_t)(planes[c][i] + 0.5f);
            }
        }
    }
}

/* Where index i of n lies once the border mirrors, its own pixel not repeated. */
static inline int mirror(int i, int n) {
    const int period = 2 * n - 2;
    i = (i % period + period) % period;
    return i < n ? i : period - i;
}

/* In place on [3, size, size]; weights: 2 * radius + 1; scratch: size * size + size + 2 * radius floats. */
void blur(uint8_t *restrict planes, int size, int radius, const float *restrict weights, float *restrict scratch) {
    float *across = scratch, *line = scratch + size * size;
    for (int c = 0; c < 3; c++) {
        uint8_t *plane = planes + c * size * size;
        for (int y = 0; y < size; y++) {
            const uint8_t *row = plane + y * size;
            for (int i = 0; i < radius; i++) { line[i] = row[mirror(i - radius, size)]; line[size + radius + i] = row[mirror(size + i, size)]; }
            for (int i = 0; i < size; i++) line[radius + i] = row[i];
            float *to = across + y * size;
            const float w0 = weights[radius];
            for (int i = 0; i < size; i++) to[i] = w0 * line[radius + i];
            for (int k = 1; k <= radius; k++) {
                const float w = weights[radius + k];
                const float *a = line + radius - k, *b = line + radius + k;
                for (int i = 0; i < size; i++) to[i] += w * (a[i] + b[i]);
            }
        }
        for (int y = 0; y < size; y++) {
            const float *row = across + y * size;
            const float w0 = weights[radius];
            for (int i = 0; i < size; i++) line[i] = w0 * row[i] + 0.5f;
            for (int k = 1; k <= radius; k++) {
                const float w = weights[radius + k];
                const float *a = across + mirror(y - k, size) * size, *b = across + mirror(y + k, size) * size;
                for (int i = 0; i < size; i++) line[i] += w * (a[i] + b[i]);
            }
            uint8_t *to = plane + y * size;
            for (int i = 0; i < size; i++) to[i] = (uint8_t)line[i];
        }
    }
}
