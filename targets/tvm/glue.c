/* Linked into every kernel library: errors raised by generated code go to the host that loaded it. */
#include <stdint.h>

void (*qcn_raise_hook)(const char* kind, const char** parts, int32_t count);

__attribute__((visibility("hidden"))) void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts,
                                                                              int32_t count) {
  if (qcn_raise_hook) qcn_raise_hook(kind, parts, count);
}
