// Wrappers for the variadic functions, function-like macros and inline functions of Debian's libraries.
#ifndef MARGARINE_CLIBRARIES_H
#define MARGARINE_CLIBRARIES_H

#include <stddef.h>
#include <stdint.h>

/// XXH3 64-bit of `length` bytes with `seed`.
uint64_t mg_xxh3(const void *data, size_t length, uint64_t seed);
/// XXH64 of `length` bytes with seed 0: what btrfs calls csum type 1.
uint64_t mg_xxh64(const void *data, size_t length);

// libcurl: its variadic functions, by the kind of the value. `easy` and `multi` are its handles, `option` and `info`
// its constants; the results are its codes.

typedef size_t (*mg_curl_data)(char *buffer, size_t size, size_t count, void *context);
typedef int (*mg_curl_seek)(void *context, long offset, int origin);
int mg_curl_set_long(void *easy, int option, long value);
int mg_curl_set_size(void *easy, int option, int64_t value);
int mg_curl_set_text(void *easy, int option, const char *value);
int mg_curl_set_pointer(void *easy, int option, void *value);
int mg_curl_set_data(void *easy, int option, mg_curl_data function);
int mg_curl_set_seek(void *easy, mg_curl_seek function);
int mg_curl_multi_set_long(void *multi, int option, long value);
long mg_curl_get_long(void *easy, int info);
void *mg_curl_get_pointer(void *easy, int info);
/// The next transfer that is done, with its result (a CURLcode), or null.
void *mg_curl_next_done(void *multi, int *result);

#endif
