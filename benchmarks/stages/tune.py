def items(context):
    return iter(())
