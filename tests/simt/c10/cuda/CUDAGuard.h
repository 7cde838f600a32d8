// See CUDAStream.h.
#pragma once
#include "CUDAStream.h"
