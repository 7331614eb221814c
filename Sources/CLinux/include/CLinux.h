// What Glibc's Swift module leaves out: Linux-only calls and function-like macros, as plain functions.
#ifndef MARGARINE_CLINUX_H
#define MARGARINE_CLINUX_H

#include <stdint.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/// CRC-32C (Castagnoli) of `length` bytes, continuing from `crc` (0 to begin). What btrfs calls csum type 0.
uint32_t mg_crc32c(uint32_t crc, const void *data, size_t length);

// Threads.

/// Names the calling thread, at most 15 bytes of it, for `top -H` and debuggers.
void mg_name_thread(const char *name);

#ifdef __cplusplus
}
#endif
#endif
