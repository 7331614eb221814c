// What the fuzzer's runtime has and Swift does not see.
#pragma once
#include <stddef.h>
#include <stdint.h>

// libFuzzer's main loop (the fuzzer's runtime, see "Using libFuzzer as a library").
int LLVMFuzzerRunDriver(int *argc, char ***argv, int (*one_input)(const uint8_t *data, size_t size));

// Counts what is allocated from here on, on all threads.
void mg_fuzz_begin_counting(void);
// Ends that. The most bytes that were allocated at one time since; 0 without Address Sanitizer.
size_t mg_fuzz_end_counting(void);
