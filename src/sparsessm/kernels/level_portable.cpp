#define LANES 4
#define LEVEL portable
#include "scan_impl.h"
