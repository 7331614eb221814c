#include "CLibraries.h"

#include <curl/curl.h>

int mg_curl_set_long(void *easy, int option, long value) { return curl_easy_setopt(easy, (CURLoption)option, value); }
int mg_curl_set_size(void *easy, int option, int64_t value) {
    return curl_easy_setopt(easy, (CURLoption)option, (curl_off_t)value);
}
int mg_curl_set_text(void *easy, int option, const char *value) { return curl_easy_setopt(easy, (CURLoption)option, value); }
int mg_curl_set_pointer(void *easy, int option, void *value) { return curl_easy_setopt(easy, (CURLoption)option, value); }
int mg_curl_set_data(void *easy, int option, mg_curl_data function) {
    return curl_easy_setopt(easy, (CURLoption)option, function);
}

int mg_curl_set_seek(void *easy, mg_curl_seek function) {
    // The same function, but for libcurl's name of a 64-bit integer.
    return curl_easy_setopt(easy, CURLOPT_SEEKFUNCTION, (int (*)(void *, curl_off_t, int))function);
}

int mg_curl_multi_set_long(void *multi, int option, long value) {
    return curl_multi_setopt(multi, (CURLMoption)option, value);
}

long mg_curl_get_long(void *easy, int info) {
    long value = 0;
    return curl_easy_getinfo(easy, (CURLINFO)info, &value) == CURLE_OK ? value : 0;
}

void *mg_curl_get_pointer(void *easy, int info) {
    char *value = NULL;
    return curl_easy_getinfo(easy, (CURLINFO)info, &value) == CURLE_OK ? value : NULL;
}

void *mg_curl_next_done(void *multi, int *result) {
    int left = 0;
    CURLMsg *message;
    while ((message = curl_multi_info_read(multi, &left)))
        if (message->msg == CURLMSG_DONE) {
            *result = message->data.result;
            return message->easy_handle;
        }
    return NULL;
}
