MINUTES = 0.1


def items(context):
    return iter(())
