#define LANES 16
#define LEVEL avx512
#include "scan_impl.h"
