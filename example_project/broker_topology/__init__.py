"""The hot-chocolate shop in the broker topology: services that know events, and not each other."""
