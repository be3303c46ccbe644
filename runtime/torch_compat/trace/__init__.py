"""What Dynamo and the symbolic shapes of a running trace know."""
