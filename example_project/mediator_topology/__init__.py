"""The hot-chocolate shop in the mediator topology: one service knows the flow, the others serve."""
