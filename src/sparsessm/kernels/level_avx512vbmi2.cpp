#define LANES 16
#define LEVEL avx512vbmi2
#include "scan_impl.h"
