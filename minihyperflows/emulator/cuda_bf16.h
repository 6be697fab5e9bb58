#pragma once  // __nv_bfloat16 is in shim.h
