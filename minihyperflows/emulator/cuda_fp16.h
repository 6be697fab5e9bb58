#pragma once  // __half is in shim.h
