#define LANES 8
#define LEVEL avx2
#include "scan_impl.h"
