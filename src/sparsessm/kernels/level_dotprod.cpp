#define LANES 4
#define LEVEL dotprod
#include "scan_impl.h"
