#include "common/isa.h"
#include "common/parallel.h"
